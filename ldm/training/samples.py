"""Training samples: which images, in which order, cropped where, with which noise. Knows no network.

Everything random follows from the seed and numbers: the noise from the sample, counted from 0 over a run, the
crop and the flip from the image and its repeat. The same run gives the same samples however it is split or
resumed, and a repeat has one crop in all epochs, flipped in every second one, so that an image's crops are
few enough to be encoded beforehand.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ldm import images
from ldm.fields import TIMESTEPS
from ldm.image_files import mask_of, read_image
from ldm.options import TrainOptions
from ldm.random_streams import (
    CAPTION,
    CLASS_CROP,
    CLASS_NOISE,
    CLASS_ORDER,
    INSTANCE_CROP,
    INSTANCE_NOISE,
    INSTANCE_ORDER,
    OFFSET,
    stream,
)
from ldm.subjects import Picture, Subject

# an image, the top left corner of a square of it, and whether that is flipped left to right
Crop = tuple[Path, int, int, bool]


@dataclass(frozen=True)
class Sample:
    """One image with a prompt, and where its crop and its noise come from."""

    path: Path
    prompt: str
    has_mask: bool
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
        pads: shrink the image into the square instead.
    """

    size: int
    random_crop: bool = False
    random_flip: bool = False
    pads: bool = False


@dataclass(frozen=True)
class Noising:
    """What is drawn for a sample besides its crop.

    Args:
        first, end: the time steps that it may have, `end` not among them.
        offset: of the noise's mean in each channel, its standard deviation (Guttenberg, CrossLabs, 2023).
        caption_dropout: how often the prompt is empty instead.
    """

    first: int = 0
    end: int = TIMESTEPS
    offset: float = 0.0
    caption_dropout: float = 0.0


class DreamBoothSamples:
    """The samples of a run: instance images, each paired with an image of its class.

    An epoch takes every instance image as often as its subject says, in an order that depends on (seed,
    epoch) alone: each subject's in an order of its own, and these interleaved in proportion. Samples are one
    long sequence, epoch after epoch, cut into batches.

    Args:
        classes: the images of each class, or none without prior preservation. They take turns, reshuffled
            every round.
    """

    def __init__(
        self, subjects: list[Subject], classes: list[list[Picture]], cropping: Cropping, seed: int,
        noising: Noising = Noising(),
    ) -> None:  # fmt: skip
        self.subjects, self.classes = subjects, classes
        self.cropping, self.size, self.seed, self.noising = cropping, cropping.size, seed, noising
        self.counts = [len(subject) for subject in subjects]
        self.samples_per_epoch = sum(self.counts)
        self._order = lru_cache(maxsize=8)(self._interleaved)
        self._class_order = lru_cache(maxsize=8 * len(subjects))(self._permutation)
        self._read = lru_cache(maxsize=512)(self._resized)
        self._mask = lru_cache(maxsize=512)(self._resized_mask)
        self._first_crop = lru_cache(maxsize=None)(self._random_crop)

    @classmethod
    def of(
        cls, options: TrainOptions, subjects: list[Subject], classes: list[list[Picture]]
    ) -> "DreamBoothSamples":
        """As a training's options say."""
        pads = options.image_fit == "pad"
        cropping = Cropping(options.image_size, options.random_crop, options.random_flip, pads)
        noising = Noising(
            options.min_timestep, options.max_timestep, options.noise_offset, options.caption_dropout
        )
        return cls(subjects, classes, cropping, options.seed, noising)

    def prompts(self) -> list[str]:
        """All that samples have, each once: first those of the instance images."""
        pictures = [picture for subject in self.subjects for picture in subject.pictures]
        pictures += [picture for pictures in self.classes for picture in pictures]
        dropped = [""] if self.noising.caption_dropout else []
        return list(dict.fromkeys([picture.prompt for picture in pictures] + dropped))

    @property
    def images_per_sample(self) -> int:
        """2 where each instance sample has a class sample beside it."""
        return 2 if self.classes else 1

    def _permutation(self, purpose: int, round_: int, which: int, length: int) -> np.ndarray:
        """Of a subject's or a class's images; which one it is is part of the key for all but the first."""
        return stream(self.seed, purpose, round_, *([which] if which else [])).permutation(length)

    def _interleaved(self, epoch: int) -> list[tuple[int, int, int]]:
        """The samples of an epoch: subject, number within it, and how many of its class came before."""
        entries = []
        for which, count in enumerate(self.counts):
            order = self._permutation(INSTANCE_ORDER, epoch, which, count)
            entries += [((place + 0.5) / count, which, int(number)) for place, number in enumerate(order)]
        entries.sort(key=lambda entry: entry[:2])
        before, result = Counter(), []
        for _, which, number in entries:
            class_number = self.subjects[which].class_number
            result.append((which, number, before[class_number]))
            before[class_number] += 1
        return result

    def _class_samples_per_epoch(self, class_number: int) -> int:
        of_class = (subject.class_number == class_number for subject in self.subjects)
        return sum(count for count, is_of_it in zip(self.counts, of_class) if is_of_it)

    def _resized(self, path: Path) -> np.ndarray:
        image = read_image(path)
        if self.cropping.pads:
            return images.pad_to_square(image, self.size)
        return images.resize_short_side(image, self.size)

    def _resized_mask(self, path: Path, has_mask: bool) -> np.ndarray:
        """(H, W) uint8, as `_resized` has the image: 255 where there is something to learn."""
        image = mask_of(path) if has_mask else Image.new("L", read_image(path).size, 255)
        if self.cropping.pads:
            return images.pad_to_square(image, self.size, "constant")
        return images.resize_short_side(image, self.size)

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
        instance, of_class = [], []
        for number in numbers:
            epoch, place = divmod(number, self.samples_per_epoch)
            which, within, before = self._order(epoch)[place]
            subject = self.subjects[which]
            repeat, index = divmod(within, len(subject.pictures))
            crop = sum(self.counts[:which]) + index * subject.repeats + repeat
            picture = subject.pictures[index]
            instance.append(self._sample(picture, number, (INSTANCE_CROP, crop), INSTANCE_NOISE, epoch))
            if self.classes:
                class_number = subject.class_number
                turn = epoch * self._class_samples_per_epoch(class_number) + before
                of_class.append(self._class_sample(class_number, number, turn))
        return instance + of_class

    def _class_sample(self, class_number: int, number: int, turn: int) -> Sample:
        """Sample `number` of the run, the `turn`-th of its class."""
        pictures = self.classes[class_number]
        round_, place = divmod(turn, len(pictures))
        index = int(self._class_order(CLASS_ORDER, round_, class_number, len(pictures))[place])
        crop = sum(map(len, self.classes[:class_number])) + index
        return self._sample(pictures[index], number, (CLASS_CROP, crop), CLASS_NOISE, round_)

    def _sample(
        self, picture: Picture, number: int, crop: tuple[int, int], noise_purpose: int, turn: int
    ) -> Sample:
        prompt, dropout = picture.prompt, self.noising.caption_dropout
        if dropout and stream(self.seed, CAPTION, number, noise_purpose).random() < dropout:
            prompt = ""
        return Sample(picture.path, prompt, picture.has_mask, number, *crop, noise_purpose, turn)

    def crop(self, sample: Sample) -> Crop:
        """Where a sample is cropped, at the centre or (`random_crop`) where its repeat is in every epoch; and
        its flip.
        """
        top, left, flipped = self._first_crop(sample.path, sample.crop_purpose, sample.crop_number)
        return sample.path, top, left, flipped ^ (self.cropping.random_flip and sample.turn % 2 == 1)

    def crops(self, count: int) -> list[Crop]:
        """The distinct crops of the first `count` samples, in the order of their first use."""
        turns = 2 if self.cropping.random_flip else 1
        # by then each has had its turns
        rounds = [
            -(-len(pictures) // self._class_samples_per_epoch(number))
            for number, pictures in enumerate(self.classes)
        ]
        every = self.samples_per_epoch * max([1, *rounds]) * turns
        return list(dict.fromkeys(self.crop(sample) for sample in self.pick(0, min(count, every))))

    def square(self, crop: Crop) -> np.ndarray:
        """(size, size, 3) uint8."""
        path, top, left, flipped = crop
        square = self._read(path)[top : top + self.size, left : left + self.size]
        return square[:, ::-1] if flipped else square

    def pixels(self, sample: Sample) -> np.ndarray:
        """(3, size, size) float32 in [-1, 1]."""
        return images.to_pixels(self.square(self.crop(sample)))

    def mask(self, sample: Sample, side: int) -> np.ndarray:
        """(1, side, side) float32 of mean 1: how much the loss counts in each place of the latents, or all 0
        where the mask of an image is empty within the sample's square.
        """
        if not (sample.has_mask or self.cropping.pads):
            return np.ones((1, side, side), np.float32)
        _, top, left, flipped = self.crop(sample)
        square = self._mask(sample.path, sample.has_mask)[top : top + self.size, left : left + self.size]
        square = square[:, ::-1] if flipped else square
        each = self.size // side
        mask = square.astype(np.float64).reshape(side, each, side, each).mean((1, 3))
        return (mask / (mask.mean() or 1)).astype(np.float32)[None]

    def forget_images(self) -> None:
        """Let go of the images held in memory; one that is asked for again is read again."""
        self._read.cache_clear()

    def noise(self, sample: Sample, shape: tuple[int, ...]) -> tuple[int, np.ndarray, np.ndarray]:
        """t, the noise added at t, and the noise of the VAE's posterior, both of `shape` and float32."""
        rng, settings = stream(self.seed, sample.noise_purpose, sample.number), self.noising
        t = settings.first + int(rng.integers(settings.end - settings.first))
        noise, posterior_noise = rng.standard_normal((2, *shape), dtype=np.float32)
        if settings.offset:
            rng = stream(self.seed, OFFSET, sample.number, sample.noise_purpose)
            noise = noise + np.float32(settings.offset) * rng.standard_normal((shape[0], 1, 1), np.float32)
        return t, noise, posterior_noise

    def batches(
        self, batch_size: int, count: int, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[list[Sample]]:
        """`count` batches from number `start` on.

        Of `ranks` processes each takes its `batch_size` samples of every batch.
        """
        for number in range(start, start + count):
            yield self.pick((number * ranks + rank) * batch_size, batch_size)
