"""Generate images from prompts with a Stable Diffusion checkpoint. `--help` lists the options."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.command_line import Ending, Pace, parse_options, progress_bar, start_logging
from ldm.drawings import Drawing, Line, drawings_of, read_prompts
from ldm.sample_options import SampleOptions

if TYPE_CHECKING:
    from ldm.run.compile_cache import CompileCache
    from ldm.sampling.drawer import Drawer

logger = logging.getLogger("text_to_image")


def main(argv: list[str] | None = None) -> None:
    with Ending("text_to_image.py"):
        options = parse_options(SampleOptions, argv).kept_apart()
        start_logging(options.log_level)
        # what needs NumPy or MindSpore, which a typing error need not wait for
        from ldm.device import log_device
        from ldm.run.compile_cache import CompileCache
        from ldm.sampling.drawer import Drawer, say_how_prompts_are_read, sized
        from ldm.weights.choice import open_model, put_on_device

        source = open_model(options)
        lines = read_prompts(options)
        sizes = [sized(line.options, source.config) for line in lines]
        options, source = put_on_device(options, source)
        settled = {"device": options.device, "precision": options.precision}
        lines = [replace(line, options=replace(its, **settled)) for line, its in zip(lines, sizes)]
        log_device(options.precision)
        output = Path(os.path.abspath(options.output_path))  # a link stays one
        (output / "samples").mkdir(parents=True, exist_ok=True)
        drawer = Drawer(options, source)
        say_how_prompts_are_read(lines, drawer.pipeline)
        batches = drawer.batches(drawings_of(lines, options))
        graphs = CompileCache.open(options.caches_graphs, drawer.graph_facts(batches))
        say_what_comes(options, lines, batches)
        generate_and_save(drawer, batches, output, graphs)


def say_what_comes(options: SampleOptions, lines: Sequence[Line], batches: Sequence) -> None:
    text = "%d images to come (prompts %d, n_iter %d, n_samples %d), %s steps each of %s"
    every = [line.options for line in lines]
    steps, names = ({str(its) for its in found} for found in zip(*map(_steps_and_sampler, every)))
    of = ", ".join(sorted(steps, key=int)), ", ".join(sorted(names))
    logger.info(text, sum(map(len, batches)), len(lines), options.n_iter, options.n_samples, *of)


def _steps_and_sampler(options: SampleOptions) -> tuple[int, str]:
    return options.sampling_steps, options.sampler_name


def generate_and_save(
    drawer: Drawer, batches: Sequence[Sequence[Drawing]], output: Path, graphs: CompileCache
) -> None:
    """Prompt by prompt: programs that judge images give each prompt a block of the numbered files."""
    from ldm import images
    from ldm.sampling.drawer import settings_of
    from ldm.sampling.text_to_image import steps_of

    options, number = drawer.options, 0
    total, steps = sum(map(len, batches)), sum(steps_of(settings_of(batch[0].options)) for batch in batches)
    folder = grid_folder(output)
    stem = "grid-" if folder == output else f"{output.name}-grid-"
    grid = images.GridPages(folder, stem, options.n_rows or options.n_samples)
    pace = Pace(steps, f"{total} images")
    with progress_bar("sampling", unit="step")(steps) as bar:

        def on_step() -> None:
            bar.update()
            pace()

        to_compile = set(map(drawer.shape, batches))
        for batch in batches:
            arrays = drawer.draw(batch, on_step)
            to_compile.discard(drawer.shape(batch))
            if not to_compile:
                graphs.mark_complete()
            for drawing, array in zip(batch, arrays) if not options.skip_save else ():
                path = images.free_path(output / "samples", "", f".{options.output_format}", number)
                number = int(path.stem) + 1
                images.save_image(array, path, drawer.texts(drawing))
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
