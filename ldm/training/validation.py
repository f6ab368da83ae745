"""Images of a model while it is trained, by its own networks: nothing of them is there twice."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from mindspore import Tensor, nn

from ldm.config import ModelConfig
from ldm.device import graphs_not_kept
from ldm.networks.autoencoder import AutoencoderKL
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.networks.text_encoder import TextEncoder
from ldm.options import TrainOptions
from ldm.prompts import PromptSyntax
from ldm.sampling.text_to_image import Sampling, TextToImage
from ldm.training.inputs import features_of


class Averaging(Protocol):
    """ldm.training.trainer.Trainer, which explains the method."""

    def averaged(self) -> AbstractContextManager: ...


class ValidationImages:
    """Draws the validation prompts of a training, each from the same noises every time.

    To be made before the frozen networks are taken out of the model.

    Args:
        options: prompts, images for each, and how class images are drawn: so are these.
        bring_back: gives a network that was taken out its values, for as long as its block lasts.
    """

    def __init__(
        self, options: TrainOptions, config: ModelConfig, model: LatentDiffusion,
        bring_back: Callable[[AutoencoderKL], AbstractContextManager],
    ) -> None:  # fmt: skip
        self.prompts, self.count = options.validation_prompt, options.validation_images
        self.seed, self.bring_back = options.seed, bring_back
        self.batch_size = min(options.sample_batch_size, len(self.prompts) * self.count)
        size = options.image_size
        self.settings = Sampling(
            options.class_sampler, options.sampling_steps, options.validation_guidance_scale, size, size
        )
        self.pipeline = TextToImage(model, config, syntax=PromptSyntax(True, True))
        self.vae, self.networks = model.first_stage_model, [model.unet]
        if options.trains_text:
            self.networks.append(model.cond_stage_model)
        else:
            self.pipeline.text_encoder = Remembered(model.cond_stage_model, self._token_ids())

    @classmethod
    def of(cls, options: TrainOptions, *its) -> "ValidationImages | None":
        """Where a training's options want them."""
        return cls(options, *its) if options.validation_prompt else None

    def _token_ids(self) -> np.ndarray:
        tokenizer, syntax = self.pipeline.tokenizer, self.pipeline.syntax
        every = [chunk for prompt in [*self.prompts, ""] for chunk in syntax.chunks(prompt, tokenizer)]
        return np.stack([chunk.token_ids for chunk in every])

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """The numbers of prompt and image; a long prompt would make others of its batch long."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for place, prompt in enumerate(self.prompts):
            rows = groups.setdefault(self.pipeline.chunk_count([prompt]), [])
            rows += [(place, number) for number in range(self.count)]
        for rows in groups.values():
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def draw(self, trainer: Averaging, on_step: Callable[[], None] = lambda: None) -> np.ndarray:
        """(P, K, H, W, 3) uint8: K images of each prompt, with averaged weights where there are any. The
        training goes on afterwards as if nothing had been. Raises FloatingPointError as TextToImage does.
        """
        drawn = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(graphs_not_kept())  # so that a run with validation has the others' graphs
            stack.enter_context(trainer.averaged())
            for network in self.networks:
                stack.enter_context(not_in_training(network))
            stack.enter_context(self.bring_back(self.vae))
            for rows in self.batches():
                drawn |= zip(rows, self._draw(rows, on_step))
        images = np.stack([drawn[row] for row in sorted(drawn)])
        return images.reshape(len(self.prompts), self.count, *images.shape[1:])

    def _draw(self, rows: list[tuple[int, int]], on_step: Callable[[], None]) -> np.ndarray:
        padded = rows + [rows[-1]] * (self.batch_size - len(rows))  # one shape, one graph
        prompts = [self.prompts[place] for place, _ in padded]
        seeds = [(self.seed, number) for _, number in padded]
        return self.pipeline(prompts, [""] * len(padded), seeds, self.settings, on_step)


class Remembered:
    """A text encoder that has left: what it answered.

    Args:
        token_ids: (N, 77) that it will be asked for.
    """

    def __init__(self, text_encoder: TextEncoder, token_ids: np.ndarray) -> None:
        features = features_of(text_encoder, token_ids)
        self.known = {ids.tobytes(): its for ids, its in zip(token_ids, features)}

    def __call__(self, token_ids: Tensor) -> Tensor:
        return Tensor(np.stack([self.known[ids.tobytes()] for ids in token_ids.asnumpy()]))


@contextlib.contextmanager
def not_in_training(network: nn.Cell) -> Iterator[None]:
    """A network without dropout, for the length of a block."""
    before = network.training
    network.set_train(False)
    try:
        yield
    finally:
        network.set_train(before)
