"""Generate images from prompts with a Stable Diffusion 2 checkpoint. `--help` lists the options."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm import images
from ldm.command_line import Ending, parse_options, progress_bar, start_logging
from ldm.config import ConfigError
from ldm.device import log_device
from ldm.run.compile_cache import CompileCache
from ldm.sample_options import SampleOptions
from ldm.weights.choice import open_model, put_on_device
from ldm.weights.source import Source

logger = logging.getLogger("text_to_image")


def main(argv: list[str] | None = None) -> None:
    with Ending("text_to_image.py"):
        options = parse_options(SampleOptions, argv).kept_apart()
        start_logging(options.log_level)
        source = open_model(options)
        config = source.config
        options = replace(options, H=options.H or config.image_size, W=options.W or config.image_size)
        config.check_size(H=options.H, W=options.W)
        prompts = read_prompts(options)
        # imports mindspore, which a typing error need not wait for
        options, source = put_on_device(options, source)
        log_device(options.precision)
        facts = {
            "attention": options.flash_attention,
            "n": options.n_samples,
            "size": (options.H, options.W),
            "guidance": options.guidance_scale == 1,
        }
        graphs = CompileCache.open(options.caches_graphs, facts | {"config": source.config})
        output = Path(os.path.abspath(options.output_path))  # a link stays one
        (output / "samples").mkdir(parents=True, exist_ok=True)
        generate_and_save(options, prompts, load_pipeline(options, source), output, graphs)


def read_prompts(options: SampleOptions) -> list[tuple[str, str]]:
    """(prompt, negative prompt) pairs from the flags or the files. Raises ConfigError."""
    prompts, negatives = [options.prompt], [options.negative_prompt]
    if options.data_path:
        lines = Path(options.data_path).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"data_path {options.data_path} must hold one prompt per line, got none")
    if options.negative_data_path:
        lines = Path(options.negative_data_path).read_text(encoding="utf-8").splitlines()
        negatives = [line.strip() for line in lines]
    if len(negatives) not in (1, len(prompts)):
        required = f"1 line or {len(prompts)} (one per prompt)"
        raise ConfigError(f"negative_data_path must have {required}, got {len(negatives)}")
    return list(zip(prompts, negatives * (len(prompts) // len(negatives))))


def load_pipeline(options: SampleOptions, source: Source) -> Callable[..., np.ndarray]:
    from ldm.networks.latent_diffusion import build_model
    from ldm.sampling import text_to_image
    from ldm.sampling.prediction import check_prediction
    from ldm.weights.checkpoint import load_checkpoint
    from ldm.weights.lora_merge import read_loras

    model = build_model(source.config, fuses_attention=options.flash_attention != "off")
    added = read_loras(options.loras, model.parameter_shapes(), source.config, options.lora_rank)
    load_checkpoint(model, source, options.use_ema_weights, added)
    check_prediction(model, source)
    model.cast_weights()
    return text_to_image.TextToImage(model, source.config)


def generate_and_save(
    options: SampleOptions,
    prompts: list[tuple[str, str]],
    pipeline: Callable,
    output: Path,
    graphs: CompileCache,
) -> None:
    """Prompt by prompt: programs that judge images give each prompt a block of the numbered files."""
    from ldm.sampling.text_to_image import Sampling

    generated, number, count = [], 0, options.n_samples
    settings = Sampling(
        options.sampler_name,
        options.sampling_steps,
        options.guidance_scale,
        options.H,
        options.W,
        options.ddim_eta,
    )
    bar = progress_bar("sampling", unit="step")(options.sampling_steps * options.n_iter * len(prompts))
    with bar:
        for row, (prompt, negative) in enumerate(prompts):
            for round_ in range(options.n_iter):
                first = 0 if options.fixed_code else (round_ * len(prompts) + row) * count
                seeds = [(options.seed, first + place) for place in range(count)]
                arrays = pipeline([prompt] * count, [negative] * count, seeds, settings, bar.update)
                graphs.mark_complete()
                generated.append(arrays)
                for array in arrays if not options.skip_save else ():
                    path = images.free_path(output / "samples", "", start=number)
                    number = int(path.stem) + 1
                    images.save_image(array, path)
    if not options.skip_save:
        logger.info("%d images in %s", sum(map(len, generated)), output / "samples")
    if not options.skip_grid:
        folder = grid_folder(output)
        path = images.free_path(folder, "grid-" if folder == output else f"{output.name}-grid-", start=0)
        images.save_image(images.grid(np.concatenate(generated), options.n_rows or count), path)
        logger.info("grid: %s", path)


def grid_folder(output: Path) -> Path:
    """Beside the output folder, since programs that judge images take all that lie in it; within, where there
    is no place.
    """
    # beside the folder that one works in is nobody's place
    at_work = Path.cwd().is_relative_to(output.resolve())
    has_no_side = at_work or os.path.ismount(output) or not os.access(output.parent, os.W_OK)
    return output if has_no_side else output.parent


if __name__ == "__main__":
    main()
