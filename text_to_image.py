"""Generate images from prompts with a Stable Diffusion 2 checkpoint. `--help` lists the options."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.command_line import Ending, Pace, parse_options, progress_bar, start_logging
from ldm.sample_options import SampleOptions
from ldm.text_files import read_lines
from ldm.values import ConfigError

if TYPE_CHECKING:
    from ldm.run.compile_cache import CompileCache
    from ldm.weights.source import Source

logger = logging.getLogger("text_to_image")


def main(argv: list[str] | None = None) -> None:
    with Ending("text_to_image.py"):
        options = parse_options(SampleOptions, argv).kept_apart()
        start_logging(options.log_level)
        # what needs NumPy or MindSpore, which a typing error need not wait for
        from ldm.device import log_device
        from ldm.run.compile_cache import CompileCache
        from ldm.weights.choice import open_model, put_on_device

        source = open_model(options)
        config = source.config
        options = replace(options, H=options.H or config.image_size, W=options.W or config.image_size)
        config.check_size(H=options.H, W=options.W)
        config.check_steps(options.sampling_steps)
        prompts = read_prompts(options)
        options, source = put_on_device(options, source)
        log_device(options.precision)
        facts = {
            "attention": options.flash_attention, "n": options.n_samples, "size": (options.H, options.W),
            "guidance": (options.guidance_scale == 1, options.guidance_rescale),
        }  # fmt: skip
        graphs = CompileCache.open(options.caches_graphs, facts | {"config": source.config})
        output = Path(os.path.abspath(options.output_path))  # a link stays one
        (output / "samples").mkdir(parents=True, exist_ok=True)
        generate_and_save(options, prompts, load_pipeline(options, source), output, graphs)


def read_prompts(options: SampleOptions) -> list[tuple[str, str]]:
    """(prompt, negative prompt) pairs from the flags or the files, line n with line n; a line without a
    prompt is left out. Raises ValueError.
    """
    prompts, negatives = [options.prompt], [options.negative_prompt]
    if options.data_path:
        prompts = read_lines(Path(options.data_path))
        if not any(prompts):
            raise ConfigError(f"data_path {options.data_path} must hold one prompt per line, got none")
        while not prompts[-1]:
            prompts.pop()
    if options.negative_data_path:
        negatives = read_lines(Path(options.negative_data_path))
        while len(negatives) > 1 and len(negatives) != len(prompts) and not negatives[-1]:
            negatives.pop()  # blank lines at the end
    if len(negatives) not in (1, len(prompts)):
        required = f"1 line or {len(prompts)} (line n belongs to line n of the prompts)"
        raise ConfigError(f"negative_data_path must have {required}, got {len(negatives)}")
    pairs = zip(prompts, negatives * (len(prompts) // len(negatives)))
    return [(prompt, negative) for prompt, negative in pairs if prompt or not options.data_path]


def load_pipeline(options: SampleOptions, source: Source) -> Callable:
    from ldm.networks.latent_diffusion import build_model
    from ldm.sampling import text_to_image
    from ldm.sampling.prediction import check_prediction
    from ldm.weights.checkpoint import load_checkpoint
    from ldm.weights.embeddings import put_embeddings, read_embedding
    from ldm.weights.lora_merge import read_loras

    model = build_model(source.config, fuses_attention=options.flash_attention != "off")
    words = dict(read_embedding(path, source.config.text_encoder.width) for path in options.embeddings)
    added = read_loras(options.loras, model.parameter_shapes(), source.config, options.lora_rank)
    load_checkpoint(model, source, options.use_ema_weights, added)
    put_embeddings(model.cond_stage_model.transformer.embedding_table, words)
    check_prediction(model, source)
    model.cast_weights()
    return text_to_image.TextToImage(model, source.config, options.guidance_rescale)


def generate_and_save(
    options: SampleOptions,
    prompts: list[tuple[str, str]],
    pipeline: Callable,
    output: Path,
    graphs: CompileCache,
) -> None:
    """Prompt by prompt: programs that judge images give each prompt a block of the numbered files."""
    from ldm import images
    from ldm.sampling.text_to_image import Sampling

    count, rounds = options.n_samples, options.n_iter
    total, steps = len(prompts) * rounds * count, options.sampling_steps
    text = "%d images to come (prompts %d, n_iter %d, n_samples %d), %d steps each of %s"
    logger.info(text, total, len(prompts), rounds, count, steps, options.sampler_name)
    settings = Sampling(
        options.sampler_name, steps, options.guidance_scale, options.H, options.W, options.ddim_eta,
        options.timestep_spacing,
    )  # fmt: skip
    folder, number = grid_folder(output), 0
    grid = images.GridPages(
        folder, "grid-" if folder == output else f"{output.name}-grid-", options.n_rows or count
    )
    pace = Pace(steps * rounds * len(prompts), f"{total} images")
    with progress_bar("sampling", unit="step")(steps * rounds * len(prompts)) as bar:

        def on_step() -> None:
            bar.update()
            pace()

        for row, (prompt, negative) in enumerate(prompts):
            for round_ in range(rounds):
                first = 0 if options.fixed_code else (round_ * len(prompts) + row) * count
                seeds = [(options.seed, first + place) for place in range(count)]
                arrays = pipeline([prompt] * count, [negative] * count, seeds, settings, on_step)
                graphs.mark_complete()
                for array in arrays if not options.skip_save else ():
                    path = images.free_path(output / "samples", "", start=number)
                    number = int(path.stem) + 1
                    images.save_image(array, path)
                if not options.skip_grid:
                    grid.add(arrays)
    if not options.skip_save:
        logger.info("%d images in %s", total, output / "samples")
    if not options.skip_grid:
        grid.save()


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
