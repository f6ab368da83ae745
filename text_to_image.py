"""Draw pictures from prompts with a Stable Diffusion 2 checkpoint. `--help` lists the options."""

import logging
import os
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ldm import device as runtime
from ldm import images
from ldm.config import ConfigError, ModelConfig, fail, read_model_config
from ldm.options import SampleOptions, parse_options

logger = logging.getLogger("text_to_image")


def read_prompts(options: SampleOptions) -> list[tuple[str, str]]:
    """(prompt, negative prompt) pairs from the flags or the files. Raises ConfigError."""
    prompts, negatives = [options.prompt], [options.negative_prompt]
    if options.data_path:
        prompts = [line.strip() for line in Path(options.data_path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise ConfigError(f"data_path {options.data_path}: has no prompt; one a line is wanted")
    if options.negative_data_path:
        negatives = [line.strip() for line in Path(options.negative_data_path).read_text(encoding="utf-8").splitlines()]
    if len(negatives) not in (1, len(prompts)):
        raise ConfigError(f"negative_data_path has {len(negatives)} lines: 1 or {len(prompts)} (one for each prompt) wanted")
    return list(zip(prompts, negatives * (len(prompts) // len(negatives))))


def run(options: SampleOptions, config: ModelConfig, prompts: list[tuple[str, str]]) -> None:
    # Only now: importing mindspore takes seconds, which a typing error need not wait for.
    from ldm.networks.latent_diffusion import build_model
    from ldm.sampling import text_to_image as pipeline
    from ldm.weights import checkpoint

    height, width = options.H or config.image_size, options.W or config.image_size
    runtime.start_device(options.device, options.mode)
    if options.compile_cache and options.mode == 0:
        runtime.enable_compile_cache("sample", options.n_samples, height, width, options.guidance_scale == 1, config)
    output = Path(os.path.abspath(options.output_path))  # a link stays one
    samples = output / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    model = build_model(config)
    checkpoint.load_weights(model, checkpoint.read_checkpoint(Path(options.ckpt_path)), options.ckpt_path)
    draw = pipeline.TextToImage(model, config)

    drawn, number = [], 0
    evaluations = options.sampling_steps * options.n_iter * len(prompts)
    with tqdm(total=evaluations, desc="sampling", unit="step", disable=None) as bar:
        # Prompt by prompt: programs that judge pictures give each prompt a block of the numbered files.
        for row, (prompt, negative) in enumerate(prompts):
            for round_ in range(options.n_iter):
                first = 0 if options.fixed_code else (round_ * len(prompts) + row) * options.n_samples
                pictures = draw(
                    [prompt] * options.n_samples, [negative] * options.n_samples,
                    [(options.seed, first + i) for i in range(options.n_samples)], sampler=options.sampler_name,
                    steps=options.sampling_steps, guidance_scale=options.guidance_scale, height=height, width=width,
                    eta=options.ddim_eta, on_step=bar.update,
                )  # fmt: skip
                drawn.append(pictures)
                runtime.keep_compiled_graphs()
                for picture in pictures if not options.skip_save else ():
                    path = images.free_path(samples, "", start=number)
                    number = int(path.stem) + 1
                    images.save_image(picture, path)
    if not options.skip_save:
        logger.info("%d pictures in %s", sum(map(len, drawn)), samples)
    if not options.skip_grid:
        folder = grid_folder(output)
        path = images.free_path(folder, "grid-" if folder == output else f"{output.name}-grid-", start=0)
        images.save_image(images.grid(np.concatenate(drawn), options.n_rows or options.n_samples), path)
        logger.info("grid: %s", path)


def grid_folder(output: Path) -> Path:
    """Beside the output folder, since programs that judge pictures take all that lie in it; within, where there is no place beside it."""
    at_work = Path.cwd().is_relative_to(output.resolve())  # beside the folder that one works in is nobody's place
    has_no_side = at_work or os.path.ismount(output) or not os.access(output.parent, os.W_OK)
    return output if has_no_side else output.parent


def main(argv: list[str] | None = None) -> None:
    try:
        options = parse_options(SampleOptions, argv)
        config = read_model_config(options.config)
        config.check_size(H=options.H or config.image_size, W=options.W or config.image_size)
        prompts = read_prompts(options)
        runtime.start_logging(options.log_level)
        run(options, config, prompts)
    except (ValueError, OverflowError, MemoryError, OSError) as error:
        fail("text_to_image.py", error)
    except KeyboardInterrupt:
        sys.exit("text_to_image.py: interrupted")


if __name__ == "__main__":
    main()
