"""What an update did, and how a training tells."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Report:
    """What an update did. Losses are means over its accumulated steps; the rate is in images per second, the
    memory the device's, on a CPU the process's.
    """

    global_step: int
    total_steps: int
    epoch: int
    loss: float
    instance_loss: float
    class_loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    gradient_norm: float
    loss_scale: float
    skipped: bool
    memory_gb: float

    def line(self) -> str:
        prior = f" instance {self.instance_loss:.4f} class {self.class_loss:.4f}" if self.class_loss else ""
        left = time.strftime("%H:%M:%S", time.gmtime(self.seconds_left))
        overflow = f", OVERFLOW: update skipped, loss scale now {self.loss_scale:g}" if self.skipped else ""
        return (
            f"step {self.global_step}/{self.total_steps} epoch {self.epoch} loss {self.loss:.4f}{prior} "
            f"lr {self.learning_rate:.3g}, {self.images_per_second:.2f} images/s, {left} left{overflow}"
        )


class UpdateResult(NamedTuple):
    """Mean (loss, instance loss, class loss), gradient norm, and whether an overflow skipped the update."""

    losses: np.ndarray
    gradient_norm: float
    skipped: bool


class TooManyOverflows(FloatingPointError):
    """Float16 overflowed in update after update, in all processes; the weights are still those of before."""

    weights_are_good = True
