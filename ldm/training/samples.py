"""Training samples: which pictures, in which order, cropped where, with which noise.

Everything random follows from the seed and numbers: the noise from the sample, counted from 0 over a run, the crop and the flip from
the picture and its repeat. The same run gives the same samples however it is split or restarted, and a repeat has one crop
in all epochs, flipped in every second one, so that a picture's crops are few enough to be encoded beforehand. Knows no network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ldm import images

# What a random stream is for: the part of its key between the seed and the number.
INSTANCE_CROP, CLASS_CROP, INSTANCE_NOISE, CLASS_NOISE, INSTANCE_ORDER, CLASS_ORDER, PICTURE = range(7)


def stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    """The random numbers of one purpose and one number of it."""
    return np.random.default_rng([seed, purpose, index])


def load_instance_images(folder: Path) -> list[Path]:
    """The pictures of a folder, each of them opened once.

    Raises:
        ValueError: the folder has none, or one is damaged, too small or too narrow.
    """
    paths = images.list_images(folder)
    if not paths:
        suffixes = " ".join(sorted(images.SUFFIXES))
        raise ValueError(f"instance_data_dir {folder}: no pictures found ({suffixes}); put 3-5 of the subject there")
    for path in paths:
        images.require_usable(path)
    return paths


Crop = tuple[Path, int, int, bool]  # a picture, the top left corner of a square of it, and whether that is flipped left to right


@dataclass(frozen=True)
class Draw:
    """One sample: a picture to read, and where its random numbers come from."""

    path: Path
    sample: int
    crop_purpose: int
    crop_number: int
    noise_purpose: int
    turn: int  # how often its crop number was drawn before: the epoch of an instance picture, the round of a class picture


class DreamBoothData:
    """Draws instance pictures, each paired with a class picture.

    An epoch draws every instance picture `repeats` times, in an order that depends on (seed, epoch) alone. Samples are
    one long sequence, epoch after epoch, cut into batches.

    Args:
        class_paths: pictures of the class, or none without prior preservation. They take turns, reshuffled every round.
        random_flip: flip half of the crops left to right; those of one epoch are the others in the next.
    """

    def __init__(
        self, instance_paths: list[Path], class_paths: list[Path], repeats: int, size: int, random_crop: bool, seed: int,
        random_flip: bool = False,
    ) -> None:  # fmt: skip
        self.instance_paths, self.class_paths = instance_paths, class_paths
        self.repeats, self.size, self.random_crop, self.seed, self.random_flip = repeats, size, random_crop, seed, random_flip
        self.samples_per_epoch = len(instance_paths) * repeats
        self._order = lru_cache(maxsize=8)(self._permutation)
        self._read = lru_cache(maxsize=512)(self._resized)
        self._first_crop = lru_cache(maxsize=None)(self._draw_crop)

    def _permutation(self, purpose: int, round_: int, length: int) -> np.ndarray:
        return stream(self.seed, purpose, round_).permutation(length)

    def _resized(self, path: Path) -> np.ndarray:
        return images.resize_short_side(images.read_image(path), self.size)

    def _draw_crop(self, path: Path, purpose: int, number: int) -> tuple[int, int, bool]:
        """Corner and flip in the first epoch or round."""
        rng = stream(self.seed, purpose, number)
        top, left = images.crop_corner(self._read(path).shape, self.size, rng if self.random_crop else None)
        return top, left, self.random_flip and rng.random() < 0.5

    def draws(self, first: int, count: int) -> list[Draw]:
        """Samples `first` to `first + count - 1`: the instance draws, then the class draws."""
        samples = range(first, first + count)
        result = []
        for sample in samples:
            epoch, place = divmod(sample, self.samples_per_epoch)
            repeat, index = divmod(int(self._order(INSTANCE_ORDER, epoch, self.samples_per_epoch)[place]), len(self.instance_paths))
            result.append(Draw(self.instance_paths[index], sample, INSTANCE_CROP, index * self.repeats + repeat, INSTANCE_NOISE, epoch))
        for sample in samples if self.class_paths else ():
            round_, place = divmod(sample, len(self.class_paths))
            index = int(self._order(CLASS_ORDER, round_, len(self.class_paths))[place])
            result.append(Draw(self.class_paths[index], sample, CLASS_CROP, index, CLASS_NOISE, round_))
        return result

    def crop(self, draw: Draw) -> Crop:
        """Where a draw is cropped: at the centre, or with `random_crop` where its repeat is in every epoch; and whether it is flipped."""
        top, left, flipped = self._first_crop(draw.path, draw.crop_purpose, draw.crop_number)
        return draw.path, top, left, flipped ^ (self.random_flip and draw.turn % 2 == 1)

    def crops(self, count: int) -> list[Crop]:
        """The distinct crops of the first `count` samples, in the order of their first draw."""
        every = max(self.samples_per_epoch, len(self.class_paths)) * (2 if self.random_flip else 1)  # by then each has had its turns
        return list(dict.fromkeys(self.crop(draw) for draw in self.draws(0, min(count, every))))

    def square(self, crop: Crop) -> np.ndarray:
        """(size, size, 3) uint8."""
        path, top, left, flipped = crop
        square = self._read(path)[top : top + self.size, left : left + self.size]
        return square[:, ::-1] if flipped else square

    def pixels(self, draw: Draw) -> np.ndarray:
        """(3, size, size) float32 in [-1, 1]."""
        return images.to_pixels(self.square(self.crop(draw)))

    def forget_pictures(self) -> None:
        """Let go of the pictures held in memory; one that is asked for again is read again."""
        self._read.cache_clear()

    def noise(self, draw: Draw, shape: tuple[int, ...], timesteps: int) -> tuple[int, np.ndarray, np.ndarray]:
        """t, the noise added at t, and the noise of the VAE's posterior, both of `shape` and float32."""
        rng = stream(self.seed, draw.noise_purpose, draw.sample)
        return int(rng.integers(timesteps)), *rng.standard_normal((2, *shape), dtype=np.float32)

    def batches(self, batch_size: int, count: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[list[Draw]]:
        """`count` batches from batch number `start` on. Of `ranks` processes each takes its `batch_size` samples of every batch."""
        for number in range(start, start + count):
            yield self.draws((number * ranks + rank) * batch_size, batch_size)
