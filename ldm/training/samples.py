"""Training samples: which images, in which order, cropped where, with which noise. Knows no network.

Everything random follows from the seed and numbers: the noise from the sample, counted from 0 over a run, the
crop and the flip from the image and its repeat. The same run gives the same samples however it is split or
resumed, and a repeat has one crop in all epochs, flipped in every second one, so that an image's crops are
few enough to be encoded beforehand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ldm import images
from ldm.image_files import FORMATS, list_images, read_image, require_usable, where_images_lie
from ldm.options import TrainOptions
from ldm.random_streams import (
    CLASS_CROP,
    CLASS_NOISE,
    CLASS_ORDER,
    INSTANCE_CROP,
    INSTANCE_NOISE,
    INSTANCE_ORDER,
    stream,
)


def load_instance_images(folder: Path) -> list[Path]:
    """The images of a folder, each of them opened once.

    Raises:
        ValueError: the folder has none, or one is damaged, too small or too narrow.
    """
    paths = list_images(folder)
    if not paths:
        where = where_images_lie(folder) or f"put 3-5 of the subject there ({', '.join(FORMATS)})"
        raise ValueError(f"instance_data_dir {folder}: no images found; {where}")
    for path in paths:
        require_usable(path)
    return paths


# an image, the top left corner of a square of it, and whether that is flipped left to right
Crop = tuple[Path, int, int, bool]


@dataclass(frozen=True)
class Sample:
    """One image, with where its crop and its noise come from."""

    path: Path
    number: int  # counted over the run
    crop_purpose: int
    crop_number: int
    noise_purpose: int
    # how often its crop number was used before: the epoch of an instance image, the round of a class image
    turn: int


@dataclass(frozen=True)
class Cropping:
    """How a training square is cut out of an image whose short side is `size` pixels.

    Args:
        random_crop: at random, otherwise at the centre.
        random_flip: flip half of the crops left to right; those of one epoch are the others in the next.
    """

    size: int
    random_crop: bool = False
    random_flip: bool = False


class DreamBoothSamples:
    """The samples of a run: instance images, each paired with a class image.

    An epoch takes every instance image `repeats` times, in an order that depends on (seed, epoch) alone.
    Samples are one long sequence, epoch after epoch, cut into batches.

    Args:
        class_paths: images of the class, or none without prior preservation. They take turns, reshuffled
            every round.
    """

    def __init__(
        self, instance_paths: list[Path], class_paths: list[Path], repeats: int, cropping: Cropping, seed: int
    ) -> None:
        self.instance_paths, self.class_paths = instance_paths, class_paths
        self.repeats, self.cropping, self.size, self.seed = repeats, cropping, cropping.size, seed
        self.samples_per_epoch = len(instance_paths) * repeats
        self._order = lru_cache(maxsize=8)(self._permutation)
        self._read = lru_cache(maxsize=512)(self._resized)
        self._first_crop = lru_cache(maxsize=None)(self._random_crop)

    @classmethod
    def of(
        cls, options: TrainOptions, instance_paths: list[Path], class_paths: list[Path]
    ) -> "DreamBoothSamples":
        """As a training's options say."""
        cropping = Cropping(options.image_size, options.random_crop, options.random_flip)
        return cls(instance_paths, class_paths, options.train_data_repeats, cropping, options.seed)

    @property
    def images_per_sample(self) -> int:
        """2 where each instance sample has a class sample beside it."""
        return 2 if self.class_paths else 1

    def _permutation(self, purpose: int, round_: int, length: int) -> np.ndarray:
        return stream(self.seed, purpose, round_).permutation(length)

    def _resized(self, path: Path) -> np.ndarray:
        return images.resize_short_side(read_image(path), self.size)

    def _random_crop(self, path: Path, purpose: int, number: int) -> tuple[int, int, bool]:
        """Corner and flip in the first epoch or round."""
        rng = stream(self.seed, purpose, number)
        top, left = images.crop_corner(
            self._read(path).shape, self.size, rng if self.cropping.random_crop else None
        )
        return top, left, self.cropping.random_flip and rng.random() < 0.5

    def pick(self, first: int, count: int) -> list[Sample]:
        """The samples of numbers `first` to `first + count - 1`: the instance samples, then as many class
        samples.
        """
        numbers = range(first, first + count)
        result = []
        for number in numbers:
            epoch, place = divmod(number, self.samples_per_epoch)
            order = self._order(INSTANCE_ORDER, epoch, self.samples_per_epoch)
            repeat, index = divmod(int(order[place]), len(self.instance_paths))
            crop = index * self.repeats + repeat
            result.append(
                Sample(self.instance_paths[index], number, INSTANCE_CROP, crop, INSTANCE_NOISE, epoch)
            )
        for number in numbers if self.class_paths else ():
            round_, place = divmod(number, len(self.class_paths))
            index = int(self._order(CLASS_ORDER, round_, len(self.class_paths))[place])
            result.append(Sample(self.class_paths[index], number, CLASS_CROP, index, CLASS_NOISE, round_))
        return result

    def crop(self, sample: Sample) -> Crop:
        """Where a sample is cropped, at the centre or (`random_crop`) where its repeat is in every epoch; and
        its flip.
        """
        top, left, flipped = self._first_crop(sample.path, sample.crop_purpose, sample.crop_number)
        return sample.path, top, left, flipped ^ (self.cropping.random_flip and sample.turn % 2 == 1)

    def crops(self, count: int) -> list[Crop]:
        """The distinct crops of the first `count` samples, in the order of their first use."""
        turns = 2 if self.cropping.random_flip else 1
        every = max(self.samples_per_epoch, len(self.class_paths)) * turns  # by then each has had its turns
        return list(dict.fromkeys(self.crop(sample) for sample in self.pick(0, min(count, every))))

    def square(self, crop: Crop) -> np.ndarray:
        """(size, size, 3) uint8."""
        path, top, left, flipped = crop
        square = self._read(path)[top : top + self.size, left : left + self.size]
        return square[:, ::-1] if flipped else square

    def pixels(self, sample: Sample) -> np.ndarray:
        """(3, size, size) float32 in [-1, 1]."""
        return images.to_pixels(self.square(self.crop(sample)))

    def forget_images(self) -> None:
        """Let go of the images held in memory; one that is asked for again is read again."""
        self._read.cache_clear()

    def noise(
        self, sample: Sample, shape: tuple[int, ...], timesteps: int
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """t, the noise added at t, and the noise of the VAE's posterior, both of `shape` and float32."""
        rng = stream(self.seed, sample.noise_purpose, sample.number)
        return int(rng.integers(timesteps)), *rng.standard_normal((2, *shape), dtype=np.float32)

    def batches(
        self, batch_size: int, count: int, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[list[Sample]]:
        """`count` batches from number `start` on.

        Of `ranks` processes each takes its `batch_size` samples of every batch.
        """
        for number in range(start, start + count):
            yield self.pick((number * ranks + rank) * batch_size, batch_size)
