"""Updates, epochs and checkpoints of a run: counting, and nothing else."""

import logging
import math
from dataclasses import dataclass

from ldm.options import TrainOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How a run's samples make up updates, and its updates epochs.

    Update numbers are counted from 1; 0 is the beginning.

    Args:
        samples_per_epoch: instance samples.
        samples_per_update: instance samples, of all processes and all accumulated steps.
        epochs: of the run. Its last update is filled up with samples of one epoch more.
        checkpoint_interval: epochs between checkpoints; the last epoch has one, too.
        max_updates: ends the run instead of the epochs: their number is then that of all that are begun.
        text_encoder_stop: the fraction of the run after which the text encoder is frozen.
    """

    samples_per_epoch: int
    samples_per_update: int
    epochs: int
    checkpoint_interval: int = 1
    max_updates: int | None = None
    text_encoder_stop: float | None = None

    @classmethod
    def of(cls, options: TrainOptions, samples_per_epoch: int, processes: int) -> "Progress":
        """As a training's options say, with so many samples and processes."""
        per_update, epochs, updates = (
            options.samples_per_update * processes,
            options.epochs,
            options.max_updates,
        )
        if updates:
            epochs = -(-updates * per_update // samples_per_epoch)
            text = "%d updates (--max_updates): %.2f epochs of %d samples, instead of %d"
            logger.info(
                text, updates, updates * per_update / samples_per_epoch, samples_per_epoch, options.epochs
            )
        return cls(
            samples_per_epoch, per_update, epochs, options.ckpt_save_interval, updates,
            options.text_encoder_stop,
        )  # fmt: skip

    def say_that_all_is_done(self) -> None:
        text = "nothing to do: all %d updates are done. To train longer, give a larger --%s."
        logger.info(text, self.total_updates, "max_updates" if self.max_updates else "epochs")

    @property
    def total_updates(self) -> int:
        return self.max_updates or -(-self.epochs * self.samples_per_epoch // self.samples_per_update)

    @property
    def text_stop(self) -> int | None:
        """The update after which the text encoder is trained no longer; None: it is trained to the end."""
        if self.text_encoder_stop is None:
            return None
        return math.ceil(self.text_encoder_stop * self.total_updates)

    def is_past_text_stop(self, update: int) -> bool:
        return self.text_stop is not None and update >= self.text_stop

    @property
    def total_samples(self) -> int:
        return self.total_updates * self.samples_per_update

    def epoch(self, update: int) -> int:
        """The epoch, from 1, that an update belongs to."""
        reached = -(-update * self.samples_per_update // self.samples_per_epoch)
        return min(max(1, reached), self.epochs)

    def epochs_done(self, update: int) -> int:
        if update >= self.total_updates:
            return self.epochs
        return update * self.samples_per_update // self.samples_per_epoch

    def epoch_to_save(self, update: int) -> int | None:
        """The epoch that an update finished, if a checkpoint of it is to be written."""
        epoch = self.epochs_done(update)
        if update < 1 or epoch == self.epochs_done(update - 1):
            return None
        return epoch if epoch % self.checkpoint_interval == 0 or epoch == self.epochs else None

    def checkpoints_to_come(self, update: int) -> int:
        """How many epochs that end after an update leave a checkpoint."""
        done, interval = self.epochs_done(update), self.checkpoint_interval
        return (
            self.epochs // interval - done // interval + (self.epochs % interval > 0 and done < self.epochs)
        )
