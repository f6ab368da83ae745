"""What the training step is fed with: latents, prompts, time steps and noise, as tensors."""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor

from ldm.config import ModelConfig
from ldm.networks.autoencoder import posterior_sample
from ldm.networks.text_encoder import EncodeText, TextEncoder
from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.schedule import NoiseSchedule, min_snr_weights
from ldm.tokenizer import Tokenizer
from ldm.training.latent_cache import Moments
from ldm.training.samples import DreamBoothSamples, Sample

PROMPTS_AT_A_TIME = 8


def encode_prompts(
    options: TrainOptions, config: ModelConfig, text_encoder: TextEncoder, prompts: list[str]
) -> dict[str, np.ndarray]:
    """What the loss takes as text, for each prompt.

    Returns:
        Token ids (77,) int32 where the text encoder is trained, else its features (77, width) float32.
    """
    token_ids = Tokenizer(config.text_encoder.context_length, config.text_encoder.padding)(prompts)
    rows = token_ids if options.trains_text else features_of(text_encoder, token_ids)
    return dict(zip(prompts, rows))


def features_of(text_encoder: TextEncoder, token_ids: np.ndarray) -> np.ndarray:
    """(P, 77, width) float32 of (P, 77) token ids; of many, some at a time."""
    size, encode = min(len(token_ids), PROMPTS_AT_A_TIME), EncodeText(text_encoder)
    found = []
    for start in range(0, len(token_ids), size):
        rows = token_ids[start : start + size]
        padded = np.concatenate(
            [rows, np.repeat(rows[-1:], size - len(rows), axis=0)]
        )  # one shape, one graph
        found.append(encode(Tensor(padded)).asnumpy().astype(np.float32)[: len(rows)])
    return np.concatenate(found)


class Inputs:
    """The batches of a run. Holds arrays; a network only where the VAE encodes in every step.

    Args:
        moments: what the VAE makes of samples, see ldm/training/latent_cache.py.
        text: of `encode_prompts`.
        weights: (T,) of the loss at each time step, or None.
        has_masks: whether the loss is weighed in each place of the latents, too.
    """

    def __init__(  # noqa: PLR0913
        self, samples: DreamBoothSamples, moments: Moments, text: dict[str, np.ndarray], config: ModelConfig,
        weights: np.ndarray | None = None, has_masks: bool = False,
    ) -> None:  # fmt: skip
        self.samples, self.moments, self.text, self.token_ids = samples, moments, text, text
        self.latent_scale = config.autoencoder.scale_factor
        self.weights, self.has_masks = weights, has_masks

    @classmethod
    def of(
        cls,
        options: TrainOptions,
        samples: DreamBoothSamples,
        moments: Moments,
        text: dict,
        config: ModelConfig,
    ) -> "Inputs":
        """As a training's options say."""
        gamma = options.min_snr_gamma
        weights = min_snr_weights(NoiseSchedule(config.noise_schedule), gamma) if gamma else None
        return cls(samples, moments, text, config, weights, options.masked_loss)

    @property
    def weighs(self) -> bool:
        """Whether a batch has weights of the loss."""
        return self.weights is not None or self.has_masks

    def encode_text(self, text_encoder: TextEncoder) -> None:
        """From now on the text is the features that a text encoder has of the token ids now."""
        features = features_of(text_encoder, np.stack(list(self.token_ids.values())))
        self.text = dict(zip(self.token_ids, features))

    def batch(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Latents, text, t and noise of the given samples, instance samples first; and, where the loss is
        weighed, its weights (B, 1, 1 or h, 1 or w).
        """
        moments = self.moments(samples)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        t, noise, posterior_noise = zip(*(self.samples.noise(sample, shape) for sample in samples))
        latents = posterior_sample(moments, np.stack(posterior_noise), self.latent_scale)
        text = np.stack([self.text[sample.prompt] for sample in samples])
        found = Tensor(latents), Tensor(text), Tensor(np.array(t, np.int32)), Tensor(np.stack(noise))
        if not self.weighs:
            return found
        weight = np.ones((len(samples), 1, 1, 1), np.float32)
        if self.weights is not None:
            weight *= self.weights[np.array(t)].reshape(-1, 1, 1, 1).astype(np.float32)
        if self.has_masks:
            weight = weight * np.stack([self.samples.mask(sample, shape[-1]) for sample in samples])
        return *found, Tensor(weight)

    def batches(self, batch_size: int, count: int, update: int = 0, ranks: Ranks = ALONE) -> Iterator[tuple]:
        """This process's `count` batches for the update after number `update`."""
        for samples in self.samples.batches(batch_size, count, update * count, ranks.rank, ranks.size):
            yield self.batch(samples)
