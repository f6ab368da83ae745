"""Text to images: prompts to context, context to denoiser, latents to pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm import images
from ldm.config import ModelConfig
from ldm.device import is_dry_run
from ldm.networks.autoencoder import Decode, Encode
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.networks.text_encoder import EncodeText
from ldm.prompts import PromptSyntax, weigh
from ldm.random_streams import IMAGE, stream
from ldm.sampling.samplers import SAMPLERS, Denoiser, timesteps_of
from ldm.schedule import NoiseSchedule, add_noise
from ldm.tokenizer import Tokenizer
from ldm.weights.arrays import is_finite


class Guided(nn.Cell):
    """Classifier-free guidance (Ho & Salimans 2022): one call on a doubled batch, negative half first.

    Args:
        rescale: by how much the result is brought back to the spread of the positive prediction, which
            guidance widens (Lin et al. 2024, section 3.4, eqs. 15 and 16).
    """

    def __init__(self, unet, rescale: float = 0.0) -> None:
        super().__init__(auto_prefix=False)
        self.unet, self.rescale = unet, rescale

    @staticmethod
    def spread(x):
        flat = x.reshape(x.shape[0], -1).astype(ms.float32)
        deviation = flat - flat.mean(1, keep_dims=True)
        return ops.sqrt(ops.square(deviation).mean(1)).reshape(-1, 1, 1, 1)

    def construct(self, x_t, t, context, guidance_scale):
        negative, positive = ops.chunk(self.unet(ops.cat((x_t, x_t)), t, context), 2)
        guided = negative + guidance_scale * (positive - negative)
        if self.rescale > 0:
            factor = self.spread(positive) / self.spread(guided)
            guided = guided * (self.rescale * factor + (1 - self.rescale))
        return guided


@dataclass(frozen=True)
class Sampling:
    """How images are generated.

    Args:
        sampler: a name in SAMPLERS.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1: none.
        height, width: in pixels.
        eta: of DDIM: 0 no noise, 1 as much as DDPM.
        spacing: of the time steps, see `timesteps_of`.
        strength: of an image to begin with, how much of it is redrawn: the share of the steps that are done.
    """

    sampler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    eta: float = 0.0
    spacing: str = "auto"
    strength: float = 1.0


def steps_of(settings: Sampling) -> int:
    """How many of the steps are done: not all, where an image is there to begin with."""
    return int(settings.steps * settings.strength)


class TextToImage:
    """Generates images with the three networks. Compiles a graph when it is first needed."""

    def __init__(
        self, model: LatentDiffusion, config: ModelConfig, guidance_rescale: float = 0.0,
        syntax: PromptSyntax = PromptSyntax(),  # noqa: B008 (frozen)
    ) -> None:  # fmt: skip
        self.config, self.syntax = config, syntax
        self.schedule = NoiseSchedule(config.noise_schedule)
        self.tokenizer = Tokenizer(config.text_encoder.context_length, config.text_encoder.padding)
        self.unet, self.text_encoder = model.unet, EncodeText(model.cond_stage_model)
        self.guided, self.decoder = Guided(model.unet, guidance_rescale), Decode(model.first_stage_model)
        self.encoder = Encode(model.first_stage_model)

    def chunk_count(self, prompts: Sequence[str]) -> int:
        """Of the longest of them."""
        return max(len(self.syntax.chunks(prompt, self.tokenizer)) for prompt in prompts)

    def encode_prompts(self, prompts: Sequence[str], count: int = 1) -> np.ndarray:
        """Context (B, 77 N, width) float32 of prompts of N chunks, `count` at the least: those that have
        fewer get chunks of the empty prompt.
        """
        split = [self.syntax.chunks(prompt, self.tokenizer) for prompt in prompts]
        (empty,) = PromptSyntax().chunks("", self.tokenizer)
        found = []
        for number in range(max(count, *map(len, split))):
            row = [chunks[number] if number < len(chunks) else empty for chunks in split]
            features = self.text_encoder(Tensor(np.stack([its.token_ids for its in row]))).asnumpy()
            found.append([weigh(its, chunk.weights) for its, chunk in zip(features.astype(np.float32), row)])
        return np.concatenate(found, axis=1)

    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """Scaled latents (1, 4, h, w) of (H, W, 3) uint8: the mean of the VAE's posterior."""
        moments = self.encoder(Tensor(images.to_pixels(image[None]))).asnumpy()
        mean, _ = np.split(self._require_finite(moments, "the VAE, encoding"), 2, axis=1)
        return mean.astype(np.float64) * self.config.autoencoder.scale_factor

    def denoiser(self, context: np.ndarray, negative_context: np.ndarray, guidance_scale: float) -> Denoiser:
        """A function of (x_t, t); with guidance scale 1 the negative half is not computed."""
        batch = len(context)
        if guidance_scale == 1:
            context = Tensor(context)
            return lambda x_t, t: self.unet(
                Tensor(x_t, ms.float32), Tensor(np.full(batch, t, np.int32)), context
            ).asnumpy()
        both, scale = Tensor(np.concatenate([negative_context, context])), Tensor(guidance_scale, ms.float32)
        return lambda x_t, t: self.guided(
            Tensor(x_t, ms.float32), Tensor(np.full(2 * batch, t, np.int32)), both, scale
        ).asnumpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, 4, h, w) to images (B, H, W, 3) uint8. Raises FloatingPointError."""
        z = Tensor(latents / self.config.autoencoder.scale_factor, ms.float32)
        return images.to_uint8(self._require_finite(self.decoder(z).asnumpy(), "the VAE, decoding"))

    def initial_noise(self, seeds: Sequence[tuple[int, int]], height: int, width: int) -> np.ndarray:
        """x_T (B, 4, h, w), each row from its own (seed, number): the batch it is in changes nothing."""
        factor = self.config.autoencoder.downsampling
        shape = (self.config.autoencoder.latent_channels, height // factor, width // factor)
        return np.stack([stream(seed, IMAGE, number).standard_normal(shape) for seed, number in seeds])

    def __call__(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        seeds: Sequence[tuple[int, int]],
        settings: Sampling,
        on_step: Callable[[], None] = lambda: None,
        image: np.ndarray | None = None,
    ) -> np.ndarray:
        """One image for each prompt: (B, H, W, 3) uint8. `seeds` gives each its (seed, number).

        Args:
            image: (H, W, 3) uint8 to begin with: noise is added to it as much as belongs to the time step at
                which the last `settings.strength` of the steps begin (SDEdit, Meng et al. 2022, section 3).

        Raises:
            FloatingPointError: a network's answer is not finite, so that there would be no image to see.
        """
        count = self.chunk_count([*prompts, *negative_prompts])
        context = self.encode_prompts(prompts, count)
        negative = self.encode_prompts(negative_prompts, count)
        for encoded in (context, negative):
            self._require_finite(encoded, "the text encoder")
        denoise = self.denoiser(context, negative, settings.guidance_scale)
        x_T = self.initial_noise(seeds, settings.height, settings.width)
        extra = {}
        if settings.sampler == "ddim" and settings.eta:
            streams = [stream(seed, IMAGE, number).spawn(1)[0] for seed, number in seeds]
            shape = x_T.shape[1:]
            extra["noise"] = lambda _: np.stack([rng.standard_normal(shape) for rng in streams])
            extra["eta"] = settings.eta
        latents = x_T
        timesteps = timesteps_of(settings.sampler, self.schedule, settings.steps, settings.spacing)
        if image is not None:
            timesteps = timesteps[settings.steps - steps_of(settings) :]
            signal, level = self.schedule.sqrt_alpha, self.schedule.sqrt_one_minus_alpha
            x_T = add_noise(self.encode_image(image), x_T, signal[timesteps[0]], level[timesteps[0]])
        sampler = SAMPLERS[settings.sampler](denoise, x_T, self.schedule, timesteps, **extra)
        for number, x_t in enumerate(sampler, 1):
            latents = self._require_finite(x_t, f"the UNet, denoising step {number} of {len(timesteps)}")
            on_step()
        return self.decode(latents)

    def _require_finite(self, values: np.ndarray, source: str) -> np.ndarray:
        """`values`, a row for each image."""
        broken = 0 if is_dry_run() else sum(not is_finite(row) for row in values)
        if broken:
            others = "" if self.config.precision == "float32" else "--precision float32, "
            raise FloatingPointError(
                f"{source}: NaN or infinite values in {broken} of {len(values)} images, which are not "
                f"saved; try {others}a lower guidance scale, another sampler, or another checkpoint"
            )
        return values
