"""Draws what options ask for: a model is opened once, images come batch by batch."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import numpy as np

from ldm import images
from ldm.config import ModelConfig
from ldm.drawings import Drawing, Line, batches_of
from ldm.image_files import read_image
from ldm.image_metadata import File, Origin, texts_of
from ldm.networks.latent_diffusion import build_model
from ldm.prompts import PromptSyntax, what_is_only_text
from ldm.sample_options import SampleOptions
from ldm.sampling.prediction import check_prediction
from ldm.sampling.text_to_image import Sampling, TextToImage
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.embeddings import put_embeddings, read_embedding
from ldm.weights.lora_files import find_lora
from ldm.weights.lora_merge import read_loras, split_weight
from ldm.weights.source import Source

logger = logging.getLogger(__name__)


def sized(options: SampleOptions, config: ModelConfig) -> SampleOptions:
    """With height and width: the model's; of an image to begin with, its shape, the short side the model's.

    Raises ConfigError where the model cannot draw images of that size, or in so many steps.
    """
    height, width = options.H or config.image_size, options.W or config.image_size
    if options.init_image and not (options.H or options.W):
        image, step = read_image(Path(options.init_image)), config.size_multiple
        scale = config.image_size / min(image.size)
        width, height = (round(side * scale / step) * step for side in image.size)
    config.check_size(H=height, W=width)
    config.check_steps(options.sampling_steps)
    return dataclasses.replace(options, H=height, W=width)


class Drawer:
    """A model that draws.

    Args:
        options: which one, with which LoRA and words; and how to read prompts.
        source: its weights.
    """

    def __init__(self, options: SampleOptions, source: Source) -> None:
        self.syntax = PromptSyntax(options.prompt_weights == "on", options.support_long_prompts)
        self.model = build_model(source.config, fuses_attention=options.flash_attention != "off")
        self.pipeline = TextToImage(self.model, source.config, options.guidance_rescale, self.syntax)
        self.load(options, source)
        self.model.cast_weights()

    def load(self, options: SampleOptions, source: Source) -> None:
        """Take other weights of the same configuration, or other LoRA: what is compiled stays so."""
        words = dict(read_embedding(path, source.config.text_encoder.width) for path in options.embeddings)
        added = read_loras(options.loras, self.model.parameter_shapes(), source.config, options.lora_rank)
        load_checkpoint(self.model, source, options.use_ema_weights, added)
        put_embeddings(self.model.cond_stage_model.transformer.embedding_table, words)
        check_prediction(self.model, source)
        self.options, self.source = options, source  # all of it is there
        self._origin: Future[Origin] = Future()
        self._notes = not (options.no_metadata or options.skip_save)
        if self._notes:
            # 5 GB take a while, and the networks leave time for it; an end before that does not wait
            Thread(target=self._find_origin, args=(self._origin,), daemon=True).start()

    def _find_origin(self, found: Future) -> None:
        try:
            loras = [(find_lora(path)[0], weight) for path, weight in map(split_weight, self.options.loras)]
            found.set_result(Origin(
                File.of(self.source.path, self.source.files),
                [File.of(path, weight=weight) for path, weight in loras],
                [File.of(path) for path in self.options.embeddings],
            ))  # fmt: skip
        except BaseException as error:
            found.set_exception(error)

    def batches(self, drawings: Sequence[Drawing]) -> list[list[Drawing]]:
        """Those that are drawn together."""
        return list(batches_of(drawings, self.options.images_at_a_time, self.chunks))

    def chunks(self, drawing: Drawing) -> int:
        """How many parts the text has."""
        return self.pipeline.chunk_count([drawing.prompt, drawing.negative_prompt])

    def draw(self, batch: Sequence[Drawing], on_step: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """The images, (H, W, 3) uint8 each, of one of `batches`. Raises as TextToImage does."""
        missing = self.options.images_at_a_time - len(batch)
        rows = [*batch, *[batch[-1]] * missing]  # one shape, one graph
        options = batch[0].options
        arrays = self.pipeline(
            [row.prompt for row in rows],
            [row.negative_prompt for row in rows],
            [(row.options.seed, row.number) for row in rows],
            settings_of(options),
            on_step,
            image_of(options),
        )
        return list(arrays[: len(batch)])

    def texts(self, drawing: Drawing) -> dict[str, str]:
        """What the file of an image carries."""
        if not self._notes:
            return {}
        return texts_of(drawing, self.options.images_at_a_time, self._origin.result(), version("mindspore"))

    def shape(self, batch: Sequence[Drawing]) -> tuple:
        """What the graphs of a batch depend on besides the drawer."""
        its = batch[0].options
        return self.chunks(batch[0]), its.H, its.W, its.guidance_scale == 1, bool(its.init_image)

    def graph_facts(self, batches: Iterable[Sequence[Drawing]]) -> dict:
        """What the graphs of batches depend on, and their order."""
        options = self.options
        return {
            "config": self.source.config, "attention": options.flash_attention,
            "shapes": list(dict.fromkeys(map(self.shape, batches))),
            "n": options.images_at_a_time, "rescale": options.guidance_rescale,
        }  # fmt: skip


def settings_of(options: SampleOptions) -> Sampling:
    return Sampling(
        options.sampler_name, options.sampling_steps, options.guidance_scale, options.H, options.W,
        options.ddim_eta, options.timestep_spacing, options.strength if options.init_image else 1.0,
    )  # fmt: skip


def image_of(options: SampleOptions) -> np.ndarray | None:
    """(H, W, 3) uint8 that images of these options begin with."""
    if not options.init_image:
        return None
    return images.cover(read_image(Path(options.init_image)), options.H, options.W)


def say_how_prompts_are_read(lines: Sequence[Line], pipeline: TextToImage) -> None:
    """Log which prompts are read in parts, and what in them is only text here."""
    for line in lines:
        if pipeline.syntax.has_weights and (found := what_is_only_text(line.prompt)):
            logger.warning("a prompt has %s, which is drawn as text: %.60s", ", ".join(found), line.prompt)
        if (count := pipeline.chunk_count([line.prompt])) > 1:
            text = "a prompt is read in %d parts of 75 tokens (--support_long_prompts): %.60s..."
            logger.info(text, count, line.prompt)
