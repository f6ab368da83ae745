"""What the training step is fed with: latents, prompts, time steps and noise, as tensors."""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor

from ldm.config import ModelConfig
from ldm.networks.autoencoder import posterior_sample
from ldm.networks.text_encoder import TextEncoder
from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.tokenizer import Tokenizer
from ldm.training.latent_cache import Moments
from ldm.training.samples import DreamBoothSamples, Sample


def encode_prompts(options: TrainOptions, config: ModelConfig, text_encoder: TextEncoder) -> np.ndarray:
    """What the loss takes as text, a row for the prompt of the instance and, if there is one, of the class.

    Returns:
        Token ids (P, 77) int32 where the text encoder is trained, else its features (P, 77, width) float32.
    """
    token_ids = Tokenizer(config.text_encoder.context_length, config.text_encoder.padding)(options.prompts)
    if options.train_text_encoder:
        return token_ids
    return text_encoder(Tensor(token_ids)).asnumpy().astype(np.float32)


class Inputs:
    """The batches of a run. Holds arrays; a network only where the VAE encodes in every step.

    Args:
        moments: what the VAE makes of samples, see ldm/training/latent_cache.py.
        text: of `encode_prompts`.
    """

    def __init__(
        self, samples: DreamBoothSamples, moments: Moments, text: np.ndarray, config: ModelConfig
    ) -> None:
        self.samples, self.moments, self.text = samples, moments, text
        self.timesteps, self.latent_scale = config.noise_schedule.timesteps, config.autoencoder.scale_factor

    def batch(self, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, text, t and noise of the given samples, instance samples first."""
        moments = self.moments(samples)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        t, noise, posterior_noise = zip(
            *(self.samples.noise(sample, shape, self.timesteps) for sample in samples)
        )
        latents = posterior_sample(moments, np.stack(posterior_noise), self.latent_scale)
        text = np.repeat(self.text, len(samples) // len(self.text), axis=0)
        return Tensor(latents), Tensor(text), Tensor(np.array(t, np.int32)), Tensor(np.stack(noise))

    def batches(self, batch_size: int, count: int, update: int = 0, ranks: Ranks = ALONE) -> Iterator[tuple]:
        """This process's `count` batches for the update after number `update`."""
        for samples in self.samples.batches(batch_size, count, update * count, ranks.rank, ranks.size):
            yield self.batch(samples)
