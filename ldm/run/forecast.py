"""What a training would do, and about how much memory, disk and time it would take (--dry_run). Nothing is
written. The estimates follow from a few measured runs: see docs/performance.md and docs/ascend.md.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from mindspore import nn

from ldm.command_line import duration
from ldm.concepts import classes_of
from ldm.fields import OPTIMIZERS
from ldm.image_files import valid_images
from ldm.options import TrainOptions
from ldm.ranks import Ranks
from ldm.subjects import Subject
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.source import Source

SIDE = 512  # pixels, of what was measured at full size
LORA_FACTOR = 0.69  # of a step's time; the rest is the frozen networks' own
FORWARD = 1 / 3  # of a training step, for as many images
GB = 1e9


class Measured(NamedTuple):
    """A training step of all weights that was measured: on which machine, of how many values, at which size,
    with how many instance samples (and as many of the class).
    """

    machine: str
    values: float
    side: int
    samples: int
    seconds: float


STEPS = {
    "CPU": (
        Measured("2 CPU cores", 1.206e9, 512, 1, 21.0),
        Measured("2 CPU cores", 94e6, 256, 1, 0.905),
        Measured("2 CPU cores", 9.2e6, 64, 4, 0.331),
    ),
    "Ascend": (Measured("an Ascend 910, by the 2023 example", 1.206e9, 512, 1, 0.46),),
}


class Counting(Protocol):
    """ldm.training.progress.Progress, which explains these."""

    total_updates: int
    epochs: int
    samples_per_update: int

    def checkpoints_to_come(self, update: int) -> int: ...


class Values(Protocol):
    """ldm.training.trained.Values."""

    trained: int
    used: int


@dataclass(frozen=True)
class Forecast:
    """A training as its options say.

    Args:
        values: how many are trained, and are in networks that the training uses.
        space: bytes that checkpoints and states to come need, and that are free.
        ranks: the processes that train together.
        done: updates that a state has behind it.
    """

    options: TrainOptions
    subjects: Sequence[Subject]
    progress: Counting
    values: Values
    space: tuple[int, int]
    ranks: Ranks
    done: int = 0

    def say(self, model: nn.Cell, source: Source) -> None:
        """To standard output, after loading the weights: whether they are whole is not known before."""
        load_checkpoint(model, source, self.options.use_ema_weights)
        if not self.ranks.is_first:
            return
        lines = self.lines()
        width = max(len(name) for name, _ in lines)
        print("dry run: nothing was trained, generated or written")
        for name, text in lines:
            print(f"  {name:{width}}  {text}")

    def lines(self) -> list[tuple[str, str]]:
        """What to say, each with a name."""
        options, progress = self.options, self.progress
        found = [("model", f"{options.checkpoint}: opened, and every weight is there")]
        for concept, subject in zip(options.subjects, self.subjects):
            count = len(subject.pictures)
            text = f"{count} of {concept.instance_prompt!r} in {concept.instance_data_dir}, all readable"
            found.append(("images", f"{text}; each {subject.repeats} times per epoch"))
        classes = classes_of(options.subjects)[0] if options.with_prior_preservation else []
        missing = 0
        for its in classes:
            folder, wanted = Path(its.class_data_dir), its.num_class_images
            has = min(wanted, len(valid_images(folder))) if folder.is_dir() else 0
            text = f"{wanted} of {its.class_prompt!r} in {folder}: {has} there"
            found.append(("class images", f"{text}, {wanted - has} to be generated"))
            missing += wanted - has
        to_come = progress.total_updates - self.done
        text = f"{to_come} to come, of {progress.samples_per_update} images of subjects"
        text += " and as many of classes" if classes else ""
        found.append(("updates", f"{text}; {progress.epochs} epochs"))
        left = min(options.keep_weights, progress.checkpoints_to_come(self.done))
        found.append(("checkpoints", f"{left} are left at the end, in {options.output_path}"))
        needed, free = self.space
        found.append(("disk", f"up to {_gb(needed)}, {_gb(free)} are free"))
        where = "memory" if options.device == "CPU" else "device memory"
        found.append((where, f"about {_gb(self.memory())}{_there_is(options.device)}"))
        times = [f"training about {duration(to_come * self.seconds_per_update())}"]
        if missing:
            times.insert(
                0, f"class images about {duration(missing / self.ranks.size * self.seconds_per_image())}"
            )
        if options.validation_prompt:
            count = len(options.validation_prompt) * options.validation_images
            if options.validation_every:
                count *= 1 + -(-to_come // options.validation_every)
            else:
                count *= 1 + progress.checkpoints_to_come(self.done)
            times.append(f"validation images about {duration(count * self.seconds_per_image())}")
        of = f"on {self._measured().machine}; compiling takes a minute or two more"
        found.append(("time", f"{', '.join(times)} {of}"))
        return found

    def _measured(self) -> Measured:
        rows = STEPS.get(self.options.device, STEPS["CPU"])
        return min(rows, key=lambda row: abs(math.log(row.values / max(1, self._whole_values()))))

    def _whole_values(self) -> int:
        return max(self.values.used, self.values.trained)

    def _per_sample(self) -> float:
        """Seconds of a training step of all weights for one image."""
        row = self._measured()
        size = (self.options.image_size / row.side) ** 2 * self._whole_values() / row.values
        return row.seconds / (2 * row.samples) * size

    def seconds_per_update(self) -> float:
        options = self.options
        images = options.samples_per_update * (1 + options.with_prior_preservation)
        return images * self._per_sample() * (LORA_FACTOR if options.use_lora else 1)

    def seconds_per_image(self) -> float:
        """Of drawing one: a step with guidance is two images forward."""
        return self.options.sampling_steps * 2 * FORWARD * self._per_sample()

    def memory(self) -> float:
        """Bytes of a process: fitted to what was measured at full size, within a tenth or so."""
        options = self.options
        images = options.train_batch_size * (1 + options.with_prior_preservation) / 2
        size = images * (options.image_size / SIDE) ** 2
        of_trained = 4 * (2 + OPTIMIZERS[options.optim] + options.use_ema) * self.values.trained
        frozen = max(0, self.values.used - self.values.trained)
        if options.device == "CPU":
            return 0.8 * of_trained + 4 * frozen + 4.5 * GB * size + 2 * GB
        return of_trained + 2 * frozen + 2.3 * GB * size


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / GB:.2g} GB"


def _there_is(device: str) -> str:
    if device != "CPU":
        return ""
    try:
        return f", the machine has {_gb(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"
    except (OSError, ValueError):
        return ""
