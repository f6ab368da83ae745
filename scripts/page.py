"""A page on this machine to draw with: prompts in, images out, and the command that draws each again.

    pip install -r requirements-page.txt
    python scripts/page.py --ckpt_path output/my_dog/dreambooth_epoch_8.ckpt

Takes the options of text_to_image.py, which are what the page begins with; several LoRA are to choose from.
Images go to samples/ in output_path, as that command's. The page is served to this machine alone, at
127.0.0.1.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ldm.command_line import Ending, parse_options, start_logging
from ldm.fields import SAMPLER_NAMES, option
from ldm.sample_options import SampleOptions
from ldm.values import ConfigError

NO_LORA = "none"
MOST_SEED = 2**31 - 1
logger = logging.getLogger("page")


@dataclass(frozen=True)
class PageOptions(SampleOptions):
    """Serve a page on this machine that draws with a Stable Diffusion checkpoint, 1.4 to 2.1."""

    EXAMPLE: ClassVar[str] = "python scripts/page.py --ckpt_path=output/my_dog/dreambooth_epoch_8.ckpt"

    UNUSED: ClassVar[tuple[str, ...]] = (
        "data_path", "negative_data_path", "n_iter", "n_samples", "batch_size", "image_number", "fixed_code",
        "n_rows", "skip_grid", "skip_save", "output_format", "init_image",
    )  # fmt: skip

    port: int = option(7860, "page", "of 127.0.0.1, where it is served", least=1, most=65535)

    def check(self) -> None:
        super().check()
        for name in self.UNUSED:
            if getattr(self, name) != getattr(SampleOptions, name):
                raise ConfigError(f"{name} does not act on the page: leave it out")


class Painter:
    """Draws one image at a time. MindSpore's settings belong to a thread: all of it runs in one."""

    def __init__(self, options: PageOptions) -> None:
        self.options = options
        self.loras = named_loras(options.loras)
        self.chosen = next(((name, weight) for name, (_, weight) in self.loras.items()), (NO_LORA, 1.0))
        self.folder = Path(os.path.abspath(options.output_path)) / "samples"
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self.thread.submit(self._open).result()

    def _open(self) -> None:
        from ldm.sampling.drawer import Drawer
        from ldm.weights.choice import open_model, put_on_device

        alone = dataclasses.replace(
            self.options,
            lora_ckpt_path=None,
            use_lora=None,
            lora_rank=None,
            n_samples=1,
            n_iter=1,
            batch_size=1,
        )
        source = open_model(alone)
        self.options, self.source = put_on_device(alone, source)
        self.drawer = Drawer(self.options, self.source)

    def __call__(self, on_step: Callable[[], None] = lambda: None, **changes) -> tuple[Path, str]:
        """The file of an image, and the command that draws it again.

        Args:
            changes: of the options, and `lora` with `lora_weight`.

        Raises as text_to_image.py does.
        """
        return self.thread.submit(self._draw, on_step, changes).result()

    def _draw(self, on_step: Callable[[], None], changes: dict) -> tuple[Path, str]:
        from ldm import images
        from ldm.drawings import Line, drawings_of
        from ldm.sampling.drawer import sized

        self._take_lora(changes.pop("lora", NO_LORA), changes.pop("lora_weight", 1.0))
        flags = {name: False for name in SAMPLER_NAMES if hasattr(self.options, name)}
        options = dataclasses.replace(self.drawer.options, **flags | changes)
        SampleOptions.check(options)
        options = sized(options, self.source.config)
        line = Line(options.prompt, options.negative_prompt, options, has_own_seed=True)
        (drawing,) = drawings_of([line], options)
        (array,) = self.drawer.draw([drawing], on_step)
        self.folder.mkdir(parents=True, exist_ok=True)
        path, texts = images.free_path(self.folder, ""), self.drawer.texts(drawing)
        images.save_image(array, path, texts)
        return path, self._command(texts)

    def _take_lora(self, name: str, weight: float) -> None:
        wanted = None if name == NO_LORA else (f"{self.loras[name][0]}:{weight:g}",)
        if wanted != self.drawer.options.lora_ckpt_path:
            self.drawer.load(dataclasses.replace(self.options, lora_ckpt_path=wanted), self.source)

    def _command(self, texts: dict[str, str]) -> str:
        from ldm.image_metadata import OWN, command_of, facts_of, files_of
        from ldm.weights.lora_merge import split_weight

        if OWN not in texts:
            return ""
        facts, options = facts_of(texts), self.drawer.options
        files = [options.checkpoint, *(split_weight(its)[0] for its in options.loras), *options.embeddings]
        files += [Path(options.config)] * (options.config != "auto")
        return command_of(facts, dict(zip((its["sha256"] for its in files_of(facts)), files)))


def named_loras(given: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """LoRA files with their weights, by names that tell them apart."""
    from ldm.files import short_names
    from ldm.weights.lora_merge import split_weight

    found = [split_weight(its) for its in given]
    return dict(zip(short_names([path for path, _ in found]), found))


def make_page(painter: Painter):
    """The page, of Gradio's Blocks."""
    import gradio as gr

    options, side = painter.options, painter.source.config.image_size
    with gr.Blocks(title=f"Draw with {options.checkpoint.name}", analytics_enabled=False) as page:
        gr.Markdown(f"## {options.checkpoint.name}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = {
                    "prompt": gr.Textbox(options.prompt, label="Prompt", lines=3, elem_id="prompt"),
                    "negative_prompt": gr.Textbox(options.negative_prompt, label="What it should not show"),
                }
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Row():
                    fields["seed"] = gr.Number(
                        options.seed, label="Seed", precision=0, minimum=0, maximum=MOST_SEED
                    )
                    fields["count"] = gr.Slider(1, 16, 1, step=1, label="Images")
                with gr.Row():
                    names = list(SAMPLER_NAMES)
                    fields["sampler"] = gr.Dropdown(names, value=options.sampler_name, label="Sampler")
                    fields["sampling_steps"] = gr.Slider(
                        1, max(150, options.sampling_steps), options.sampling_steps, step=1, label="Steps"
                    )
                fields["guidance_scale"] = gr.Slider(
                    0, max(20, options.guidance_scale), options.guidance_scale, step=0.5, label="Guidance"
                )
                with gr.Group(visible=bool(painter.loras)):
                    fields["lora"] = gr.Dropdown(
                        [NO_LORA, *painter.loras], value=painter.chosen[0], label="LoRA", elem_id="lora"
                    )
                    fields["lora_weight"] = gr.Slider(-1, 2, painter.chosen[1], step=0.05, label="Weight")
            with gr.Column(scale=2, min_width=300):
                gallery = gr.Gallery(
                    label=f"{side} x {side}, in {options.output_path}/samples", columns=3, height=600,
                    fit_columns=False, object_fit="contain", elem_id="gallery",
                )  # fmt: skip
                recipe = gr.Textbox(
                    label="The command that draws the last one again", lines=4, buttons=["copy"],
                    interactive=False, elem_id="recipe",
                )  # fmt: skip
        whole, bar = ("seed", "count", "sampling_steps"), gr.Progress()

        def draw(values: dict, progress=bar):
            given = {name: values[field] for name, field in fields.items()}
            given |= {name: int(given[name] or 0) for name in whole}
            count, found, done = given.pop("count"), [], 0

            def on_step() -> None:
                nonlocal done
                done += 1
                progress((done, count * given["sampling_steps"]), f"image {len(found) + 1} of {count}")

            for number in range(count):
                try:
                    path, command = painter(on_step, image_number=number, **given)
                except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
                    raise gr.Error(str(error), duration=None) from None
                found.append(str(path))
                yield found, command

        events = [button.click, fields["prompt"].submit]
        gr.on(events, draw, set(fields.values()), [gallery, recipe], concurrency_limit=1)
    return page


def main(argv: list[str] | None = None) -> None:
    with Ending("page.py"):
        options = parse_options(PageOptions, argv)
        start_logging(options.log_level)
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            import gradio as gr
        except ImportError:
            raise ConfigError("gradio is not installed: pip install -r requirements-page.txt") from None
        logging.getLogger("httpx").setLevel(logging.WARNING)
        painter = Painter(options)
        page = make_page(painter)
        logger.info("open http://127.0.0.1:%d in a browser; Ctrl-C ends it", options.port)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        page.queue().launch(
            server_name="127.0.0.1", server_port=options.port, share=False, quiet=True, theme=theme,
            allowed_paths=[str(painter.folder)], footer_links=[],
        )  # fmt: skip


if __name__ == "__main__":
    main()
