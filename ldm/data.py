"""Training samples: which pictures, in which order, cropped where, with which noise.

Everything random follows from (seed, sample), where `sample` counts the draws of a run from 0: the same run gives the
same samples however it is split or restarted. Knows no network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ldm import images

# What a random stream is for: the third part of its key, beside the seed and the sample.
INSTANCE_CROP, CLASS_CROP, INSTANCE_NOISE, CLASS_NOISE, INSTANCE_ORDER, CLASS_ORDER, PICTURE = range(7)


def stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    """The random numbers of one purpose and one sample."""
    return np.random.default_rng([seed, purpose, index])


def load_instance_images(folder: Path) -> list[Path]:
    """The pictures of a folder, each of them opened once.

    Raises:
        ValueError: the folder has none, or one is damaged.
    """
    paths = images.list_images(folder)
    if not paths:
        suffixes = " ".join(sorted(images.SUFFIXES))
        raise ValueError(f"instance_data_dir {folder}: no pictures found ({suffixes}); put 3-5 of the subject there")
    for path in paths:
        images.read_image(path)
    return paths


@dataclass(frozen=True)
class Draw:
    """One sample: a picture to read, and where its random numbers come from."""

    path: Path
    sample: int
    crop_purpose: int
    noise_purpose: int


class DreamBoothData:
    """Draws instance pictures, each paired with a class picture.

    An epoch draws every instance picture `repeats` times, in an order that depends on (seed, epoch) alone. Samples are
    one long sequence, epoch after epoch, cut into batches.

    Args:
        class_paths: pictures of the class, or none without prior preservation. They take turns, reshuffled every round.
    """

    def __init__(self, instance_paths: list[Path], class_paths: list[Path], repeats: int, size: int, random_crop: bool, seed: int) -> None:
        self.instance_paths, self.class_paths = instance_paths, class_paths
        self.repeats, self.size, self.random_crop, self.seed = repeats, size, random_crop, seed
        self.samples_per_epoch = len(instance_paths) * repeats
        self._order = lru_cache(maxsize=8)(self._permutation)
        self._read = lru_cache(maxsize=512)(self._resized)

    def _permutation(self, purpose: int, round_: int, length: int) -> np.ndarray:
        return stream(self.seed, purpose, round_).permutation(length)

    def _resized(self, path: Path) -> np.ndarray:
        return images.resize_short_side(images.read_image(path), self.size)

    def draws(self, first: int, count: int) -> list[Draw]:
        """Samples `first` to `first + count - 1`: the instance draws, then the class draws."""
        samples = range(first, first + count)
        result = []
        for sample in samples:
            epoch, place = divmod(sample, self.samples_per_epoch)
            index = self._order(INSTANCE_ORDER, epoch, self.samples_per_epoch)[place] % len(self.instance_paths)
            result.append(Draw(self.instance_paths[index], sample, INSTANCE_CROP, INSTANCE_NOISE))
        for sample in samples if self.class_paths else ():
            round_, place = divmod(sample, len(self.class_paths))
            index = self._order(CLASS_ORDER, round_, len(self.class_paths))[place]
            result.append(Draw(self.class_paths[index], sample, CLASS_CROP, CLASS_NOISE))
        return result

    def pixels(self, draw: Draw) -> np.ndarray:
        """(3, size, size) float32 in [-1, 1]."""
        rng = stream(self.seed, draw.crop_purpose, draw.sample) if self.random_crop else None
        return images.to_pixels(images.crop(self._read(draw.path), self.size, rng))

    def noise(self, draw: Draw, shape: tuple[int, ...], timesteps: int) -> tuple[int, np.ndarray, np.ndarray]:
        """t, the noise added at t, and the noise of the VAE's posterior, both of `shape` and float32."""
        rng = stream(self.seed, draw.noise_purpose, draw.sample)
        return int(rng.integers(timesteps)), *rng.standard_normal((2, *shape), dtype=np.float32)

    def batches(self, batch_size: int, count: int, start: int = 0) -> Iterator[list[Draw]]:
        """`count` batches from batch number `start` on."""
        for number in range(start, start + count):
            yield self.draws(number * batch_size, batch_size)
