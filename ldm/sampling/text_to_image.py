"""Text to images: prompts to context, context to denoiser, latents to pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm import images
from ldm.config import ModelConfig
from ldm.device import is_dry_run
from ldm.networks.autoencoder import Decode
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.random_streams import IMAGE, stream
from ldm.sampling.samplers import SAMPLERS, Denoiser, timesteps_of
from ldm.schedule import NoiseSchedule
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
    """

    sampler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    eta: float = 0.0
    spacing: str = "auto"


class TextToImage:
    """Generates images with the three networks. Compiles a graph when it is first needed."""

    def __init__(self, model: LatentDiffusion, config: ModelConfig, guidance_rescale: float = 0.0) -> None:
        self.config = config
        self.schedule = NoiseSchedule(config.noise_schedule)
        self.tokenizer = Tokenizer(config.text_encoder.context_length, config.text_encoder.padding)
        self.unet, self.text_encoder = model.unet, model.cond_stage_model
        self.guided, self.decoder = Guided(model.unet, guidance_rescale), Decode(model.first_stage_model)

    def encode_prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Context (B, 77, width) float32."""
        return self.text_encoder(Tensor(self.tokenizer(prompts))).asnumpy().astype(np.float32)

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
    ) -> np.ndarray:
        """One image for each prompt: (B, H, W, 3) uint8. `seeds` gives each its (seed, number).

        Raises:
            FloatingPointError: a network's answer is not finite, so that there would be no image to see.
        """
        context, negative = self.encode_prompts(prompts), self.encode_prompts(negative_prompts)
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
        sampler = SAMPLERS[settings.sampler](denoise, x_T, self.schedule, timesteps, **extra)
        for number, x_t in enumerate(sampler, 1):
            latents = self._require_finite(x_t, f"the UNet, denoising step {number} of {settings.steps}")
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
