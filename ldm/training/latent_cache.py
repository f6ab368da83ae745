"""The VAE's moments of the training samples: encoded in every step, or once before training and kept for the
next run.

Both forms are a function of samples: moments(samples) gives (B, 8, h, w) float32. Sampling from the moments
is done in ldm/training/inputs.py.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from mindspore import Tensor

from ldm import images
from ldm.config import ModelConfig
from ldm.device import is_dry_run
from ldm.files import appears_whole
from ldm.networks.autoencoder import AutoencoderKL, Encode
from ldm.ranks import Ranks
from ldm.training.samples import Crop, DreamBoothSamples, Sample
from ldm.weights.arrays import is_finite

FORMAT = 2  # a part of every key: count it up when the encoder's arithmetic or the form of an entry changes
Moments = Callable[[list[Sample]], np.ndarray]
logger = logging.getLogger(__name__)


class Encoding:
    """Moments encoded in every step."""

    def __init__(self, autoencoder: AutoencoderKL, samples: DreamBoothSamples) -> None:
        self.autoencoder, self.encoder, self.samples = autoencoder, Encode(autoencoder), samples

    def __call__(self, samples: list[Sample]) -> np.ndarray:
        pixels = np.stack([self.samples.pixels(sample) for sample in samples])
        moments = self.encoder(Tensor(pixels)).asnumpy()
        for sample, entry in zip(samples, moments):
            _require_finite(entry, sample.path)
        return moments

    def cached(
        self, config: ModelConfig, folder: Path, count: int, batch_size: int, ranks: Ranks,
        show: Callable[[int], AbstractContextManager],
    ) -> "LatentCache":  # fmt: skip
        """The same for the first `count` samples, without the VAE: see LatentCache."""
        cache = LatentCache(self.samples, config, encoder_digest(self.autoencoder, config), folder)
        cache.fill(self.autoencoder, count, batch_size * self.samples.images_per_sample, ranks, show)
        return cache


def _is_sound(entry: np.ndarray) -> bool:
    return is_dry_run() or is_finite(entry)


def _require_finite(entry: np.ndarray, path: Path) -> None:
    if not _is_sound(entry):
        raise FloatingPointError(
            f"{path}: the VAE's latents of it are NaN or infinite: give --precision float32, or, if that is "
            f"the precision, a base checkpoint whose VAE is whole"
        )


def encoder_digest(autoencoder: AutoencoderKL, config: ModelConfig) -> bytes:
    """What the moments depend on besides the image: the encoder's weights, configuration, compute dtype."""
    digest = hashlib.sha256(repr((FORMAT, config.autoencoder, config.precision)).encode())
    parameters = [*autoencoder.encoder.get_parameters(), *autoencoder.quant_conv.get_parameters()]
    for parameter in sorted(parameters, key=lambda parameter: parameter.name):
        digest.update(f"{parameter.name} {parameter.shape} {parameter.dtype}".encode())
        digest.update(np.ascontiguousarray(parameter.asnumpy()))
    return digest.digest()


class LatentCache:
    """Moments that were computed before training: `fill`, then call it.

    An entry is a file <key>.npy, whose key is the SHA-256 of `digest` and of the pixels: a changed image,
    crop or VAE is another entry, so none is ever out of date. An entry that cannot be read is encoded again,
    and a folder that cannot be written to costs the next run its entries, nothing else.

    Args:
        digest: see encoder_digest. The VAE itself is not held here, so that it can leave memory.
        folder: where the entries are; None: nowhere.
    """

    def __init__(
        self, samples: DreamBoothSamples, config: ModelConfig, digest: bytes, folder: Path | None
    ) -> None:
        self.samples, self.digest, self.folder = samples, digest, folder
        side = samples.size // config.autoencoder.downsampling
        self.shape = (2 * config.autoencoder.latent_channels, side, side)
        self._key: dict[Crop, str] = {}
        self._moments: dict[str, np.ndarray] = {}

    def fill(
        self, autoencoder: AutoencoderKL, count: int, batch_size: int, ranks: Ranks,
        show: Callable[[int], AbstractContextManager],
    ) -> None:  # fmt: skip
        """Read all that the first `count` samples need; what is missing, the processes encode together.

        Args:
            show: opens a progress bar for that many images.
        """

        def look() -> list[tuple[str, Crop]]:
            missing = self.load(count)
            if ranks.is_first:
                logger.info("latents: %d cached, %d to encode", len(self._moments), len(missing))
            return missing

        def encode(missing: Sequence[tuple[str, Crop]]) -> None:
            with show(len(missing)) as bar:
                for encoded in self.encode(autoencoder, batch_size, missing):
                    bar.update(encoded)

        if unseen := ranks.divide(look, encode):
            text = "%s: latents of other processes are not all there; encoding %d more"
            logger.warning(text, self.folder, len(unseen))
            encode(unseen)
        self.samples.forget_images()

    def load(self, count: int) -> list[tuple[str, Crop]]:
        """Read what the first `count` samples need.

        Returns what is not there, to be encoded: keys and crops.
        """
        missing: dict[str, Crop] = {}
        for crop in self.samples.crops(count):
            if crop not in self._key:
                square = np.ascontiguousarray(self.samples.square(crop))
                content = self.digest + repr(square.shape).encode() + square.tobytes()
                self._key[crop] = hashlib.sha256(content).hexdigest()
            key = self._key[crop]
            if key in self._moments or key in missing:
                continue  # the same image twice
            entry = self._read(key)
            if entry is None:
                missing[key] = crop
            else:
                self._moments[key] = entry
        return list(missing.items())

    def encode(
        self, autoencoder: AutoencoderKL, batch_size: int, missing: Sequence[tuple[str, Crop]]
    ) -> Iterator[int]:
        """Encode and keep what is missing; yields the number of entries after every batch.

        Raises FloatingPointError where an image's moments are not finite; they are not kept.
        """
        encoder = Encode(autoencoder)  # compiled when it is first called, and gone with this generator
        for start in range(0, len(missing), batch_size):
            chosen = missing[start : start + batch_size]
            # one shape, one graph
            crops = [crop for _, crop in chosen] + [chosen[-1][1]] * (batch_size - len(chosen))
            pixels = np.stack([images.to_pixels(self.samples.square(crop)) for crop in crops])
            for (key, crop), entry in zip(chosen, encoder(Tensor(pixels)).asnumpy()):
                _require_finite(entry, crop[0])
                self._moments[key] = entry.copy()
                self._write(key, entry)
            yield len(chosen)

    def __call__(self, samples: list[Sample]) -> np.ndarray:
        return np.stack([self._moments[self._key[self.samples.crop(sample)]] for sample in samples])

    def _read(self, key: str) -> np.ndarray | None:
        if not self.folder:
            return None
        path = self.folder / f"{key}.npy"
        try:
            entry = np.load(path, allow_pickle=False)
            if entry.dtype != np.float32 or entry.shape != self.shape:
                raise ValueError(f"{entry.dtype} {entry.shape} instead of float32 {self.shape}")
            if not _is_sound(entry):
                raise ValueError("values that are not finite")
            return entry
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # the reader raises whatever the damage leads to
            logger.warning("%s: cannot read cached latents (%s); encoding again", path, error)
            return None

    def _write(self, key: str, entry: np.ndarray) -> None:
        if not self.folder:
            return
        try:
            with appears_whole(self.folder / f"{key}.npy", durable=False) as file:
                np.save(file, entry)
        except OSError as error:
            logger.warning("latents are not kept for the next run (%s)", error)
            self.folder = None
