"""Text to pictures: prompts to context, context to denoiser, latents to pixels; and the sampling of class pictures."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm import images
from ldm.config import ModelConfig
from ldm.networks.autoencoder import Decode
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.sampling.samplers import SAMPLERS, Denoiser
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer
from ldm.training.samples import PICTURE, stream

logger = logging.getLogger(__name__)


class Guided(nn.Cell):
    """Classifier-free guidance (Ho & Salimans 2022) in one UNet call on a doubled batch: negative half first."""

    def __init__(self, unet) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(self, x_t, t, context, guidance_scale):
        negative, positive = ops.chunk(self.unet(ops.cat((x_t, x_t)), t, context), 2)
        return negative + guidance_scale * (positive - negative)


class TextToImage:
    """Draws pictures with the three networks. Compiles a graph when it is first needed."""

    def __init__(self, model: LatentDiffusion, config: ModelConfig) -> None:
        self.config = config
        self.schedule = NoiseSchedule(config.noise_schedule)
        self.tokenizer = Tokenizer(config.text_encoder.context_length)
        self.unet, self.text_encoder = model.unet, model.cond_stage_model
        self.guided, self.decoder = Guided(model.unet), Decode(model.first_stage_model)

    def encode_prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Context (B, 77, width) float32."""
        return self.text_encoder(Tensor(self.tokenizer(prompts))).asnumpy().astype(np.float32)

    def denoiser(self, context: np.ndarray, negative_context: np.ndarray, guidance_scale: float) -> Denoiser:
        """A function of (x_t, t); with guidance scale 1 the negative half is not computed."""
        batch = len(context)
        if guidance_scale == 1:
            context = Tensor(context)
            return lambda x_t, t: self.unet(Tensor(x_t, ms.float32), Tensor(np.full(batch, t, np.int32)), context).asnumpy()
        both, scale = Tensor(np.concatenate([negative_context, context])), Tensor(guidance_scale, ms.float32)
        return lambda x_t, t: self.guided(Tensor(x_t, ms.float32), Tensor(np.full(2 * batch, t, np.int32)), both, scale).asnumpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, 4, h, w) to pictures (B, H, W, 3) uint8."""
        z = Tensor(latents / self.config.autoencoder.scale_factor, ms.float32)
        return images.to_uint8(self.decoder(z).asnumpy())

    def initial_noise(self, seeds: Sequence[tuple[int, int]], height: int, width: int) -> np.ndarray:
        """x_T (B, 4, h, w), each row from its own (seed, number): the batch it is in changes nothing."""
        shape = self._latent_shape(height, width)
        return np.stack([stream(seed, PICTURE, number).standard_normal(shape) for seed, number in seeds])

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self.config.autoencoder.downsampling
        return (self.config.autoencoder.latent_channels, height // factor, width // factor)

    def __call__(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], seeds: Sequence[tuple[int, int]], *, sampler: str,
        steps: int, guidance_scale: float, height: int, width: int, eta: float = 0.0, on_step: Callable[[], None] = lambda: None,
    ) -> np.ndarray:  # fmt: skip
        """One picture for each prompt: (B, H, W, 3) uint8. `seeds` gives each its (seed, number)."""
        denoise = self.denoiser(self.encode_prompts(prompts), self.encode_prompts(negative_prompts), guidance_scale)
        x_T = self.initial_noise(seeds, height, width)
        extra = {}
        if sampler == "ddim" and eta:
            shape = self._latent_shape(height, width)
            streams = [stream(seed, PICTURE, number).spawn(1)[0] for seed, number in seeds]
            extra = dict(eta=eta, noise=lambda _: np.stack([rng.standard_normal(shape) for rng in streams]))
        for latents in SAMPLERS[sampler](denoise, x_T, self.schedule, steps, **extra):  # noqa: B007 (the last one is decoded)
            on_step()
        return self.decode(latents)


def valid_class_images(folder: Path) -> list[Path]:
    """The readable pictures of a folder; damaged ones are named in the log and left out."""
    valid = []
    for path in images.list_images(folder):
        try:
            images.read_image(path)
            valid.append(path)
        except ValueError as error:
            logger.warning("left out: %s", error)
    return valid


def class_image_path(folder: Path, number: int) -> Path:
    return folder / f"class_{number:05d}.png"


def missing_class_numbers(folder: Path, missing: int) -> list[int]:
    """The numbers of the next `missing` class pictures: the lowest ones whose files are not there."""
    numbers = range(max(0, missing) + len(list(folder.iterdir())))
    return [number for number in numbers if not class_image_path(folder, number).exists()][: max(0, missing)]


def sample_class_images(
    pipeline: TextToImage, folder: Path, prompt: str, numbers: Sequence[int], *, seed: int, batch_size: int, sampler: str,
    steps: int, guidance_scale: float, size: int,
) -> Iterator[Path]:  # fmt: skip
    """Draw the class pictures of the given numbers into `folder`, yielding each one's path when it is written.

    Picture number n is drawn from (seed, n): a run that was interrupted goes on with the pictures that it would have
    drawn, and several processes draw what one would.
    """
    for start in range(0, len(numbers), batch_size):
        chosen = numbers[start : start + batch_size]
        seeds = [(seed, n) for n in chosen] + [(seed, chosen[-1])] * (batch_size - len(chosen))  # one shape, one graph
        pictures = pipeline(
            [prompt] * batch_size, [""] * batch_size, seeds, sampler=sampler, steps=steps,
            guidance_scale=guidance_scale, height=size, width=size,
        )  # fmt: skip
        for number, picture in zip(chosen, pictures):
            path = class_image_path(folder, number)
            images.save_image(picture, path)
            yield path
