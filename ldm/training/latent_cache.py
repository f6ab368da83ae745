"""The VAE's moments of the pictures that training draws: encoded when they are drawn, or once beforehand and kept on disk.

Both forms are a function of draws, for the trainer: moments(draws) gives (B, 8, h, w) float32. Sampling from the moments
is the trainer's.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor

from ldm import device as runtime
from ldm import images
from ldm.config import ModelConfig
from ldm.networks.autoencoder import AutoencoderKL, Encode
from ldm.training.samples import Crop, Draw, DreamBoothData

FORMAT = 1  # a part of every key: count it up when the encoder's arithmetic or the form of an entry changes
Moments = Callable[[list[Draw]], np.ndarray]
logger = logging.getLogger(__name__)


class Encoding:
    """Moments encoded anew for every draw."""

    def __init__(self, autoencoder: AutoencoderKL, data: DreamBoothData) -> None:
        self.encoder, self.data = Encode(autoencoder), data

    def __call__(self, draws: list[Draw]) -> np.ndarray:
        return self.encoder(Tensor(np.stack([self.data.pixels(draw) for draw in draws]))).asnumpy()


def encoder_digest(autoencoder: AutoencoderKL, config: ModelConfig) -> bytes:
    """What the moments depend on beside the picture: the encoder's weights, configuration and compute dtype."""
    digest = hashlib.sha256(repr((FORMAT, config.autoencoder, config.use_fp16)).encode())
    parameters = [*autoencoder.encoder.get_parameters(), *autoencoder.quant_conv.get_parameters()]
    for parameter in sorted(parameters, key=lambda parameter: parameter.name):
        digest.update(f"{parameter.name} {parameter.shape} {parameter.dtype}".encode())
        digest.update(np.ascontiguousarray(parameter.asnumpy()))
    return digest.digest()


class LatentCache:
    """Moments that were computed before training: `load`, `encode`, then call it.

    An entry is a file <key>.npy, whose key is the SHA-256 of `digest` and of the pixels: a changed picture, crop or VAE is
    another entry, so none is ever out of date. An entry that cannot be read is encoded again, and a folder that cannot be
    written to costs the next run its entries, nothing else.

    Args:
        digest: see encoder_digest. The VAE itself is not held here, so that it can leave memory.
        folder: where the entries are; None: nowhere.
    """

    def __init__(self, data: DreamBoothData, config: ModelConfig, digest: bytes, folder: Path | None) -> None:
        self.data, self.digest, self.folder = data, digest, folder
        side = data.size // config.autoencoder.downsampling
        self.shape = (2 * config.autoencoder.latent_channels, side, side)
        self._key: dict[Crop, str] = {}
        self._moments: dict[str, np.ndarray] = {}
        self._missing: dict[str, Crop] = {}

    def load(self, count: int) -> tuple[int, int]:
        """Read what the first `count` samples need. Returns how many entries were found, and how many are to be encoded."""
        for crop in self.data.crops(count):
            square = np.ascontiguousarray(self.data.square(crop))
            key = hashlib.sha256(self.digest + repr(square.shape).encode() + square.tobytes()).hexdigest()
            self._key[crop] = key
            if key in self._moments or key in self._missing:
                continue  # the same picture twice
            entry = self._read(key)
            if entry is None:
                self._missing[key] = crop
            else:
                self._moments[key] = entry
        return len(self._moments), len(self._missing)

    def encode(
        self, autoencoder: AutoencoderKL, batch_size: int, share: Callable[[Sequence], Sequence] = lambda all_: all_
    ) -> Iterator[int]:
        """Encode this process's `share` of what `load` did not find; yields the number of entries after every batch."""
        encoder = Encode(autoencoder)  # compiled when it is first called, and gone with this generator
        missing = share(list(self._missing.items()))
        for start in range(0, len(missing), batch_size):
            chosen = missing[start : start + batch_size]
            crops = [crop for _, crop in chosen] + [chosen[-1][1]] * (batch_size - len(chosen))  # one shape, one graph
            moments = encoder(Tensor(np.stack([images.to_pixels(self.data.square(crop)) for crop in crops]))).asnumpy()
            for (key, _), entry in zip(chosen, moments):
                self._moments[key] = entry.copy()
                self._write(key, entry)
            yield len(chosen)
        self._missing.clear()

    def __call__(self, draws: list[Draw]) -> np.ndarray:
        return np.stack([self._moments[self._key[self.data.crop(draw)]] for draw in draws])

    def _read(self, key: str) -> np.ndarray | None:
        if not self.folder:
            return None
        path = self.folder / f"{key}.npy"
        try:
            entry = np.load(path, allow_pickle=False)
            if entry.dtype != np.float32 or entry.shape != self.shape:
                raise ValueError(f"{entry.dtype} {entry.shape} instead of float32 {self.shape}")
            return entry
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # the reader raises whatever the damage leads to
            logger.warning("%s: no such latents (%s); encoding the picture again", path, error)
            return None

    def _write(self, key: str, entry: np.ndarray) -> None:
        if not self.folder:
            return
        partial = runtime.partial_path(self.folder / key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.save(file, entry)
            os.replace(partial, self.folder / f"{key}.npy")
        except OSError as error:
            logger.warning("latents are not kept for the next run (%s)", error)
            self.folder = None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
