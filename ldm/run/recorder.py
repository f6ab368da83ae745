"""What a training leaves on the disk while it goes on: metrics, log lines, states and checkpoints."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from ldm.run.checkpoints import embedding_beside
from ldm.run.folder import RunFolder
from ldm.run.states import State
from ldm.subjects import Subject

logger = logging.getLogger(__name__)


class Trained(Protocol):
    """What is recorded: ldm.training.trainer.Trainer, which explains the methods."""

    global_step: int
    trained_values: int

    def weights(self) -> Mapping: ...
    def averages(self) -> Mapping | None: ...
    def state(self) -> tuple[Mapping, dict]: ...
    def restore(self, arrays: Mapping, counters: dict, source: str) -> None: ...
    def require_equal_weights(self) -> None: ...
    def agree_on_weights(self) -> None: ...
    def require_finite_weights(self) -> None: ...


class Counting(Protocol):
    """Which updates end an epoch, or the run: ldm.training.progress.Progress."""

    total_updates: int
    epochs: int
    text_stop: int | None

    def epoch_to_save(self, update: int) -> int | None: ...
    def say_that_all_is_done(self) -> None: ...


class Recorder:
    """Records a training in a run's folder.

    Of several processes the first writes; the others take part in the checks.

    Args:
        origin: what the run is made of, see ldm/run/recipe.py.
    """

    def __init__(self, folder: RunFolder, trainer: Trained, progress: Counting, origin: dict) -> None:
        self.folder, self.checkpoints, self.trainer = folder, folder.checkpoints, trainer
        self.progress, self.origin, self.options, self.ranks = progress, origin, folder.options, folder.ranks

    def resume(self, state: State | None) -> None:
        """Restore a state, and write the checkpoint that a run killed after saving it has left out."""
        if state is None:
            return
        trainer = self.trainer
        trainer.restore(state.arrays(), state.progress, str(state.path))
        total = self.progress.total_updates
        logger.info("resumed from %s: %d of %d updates done", state.path, trainer.global_step, total)
        if self.ranks.is_first:
            for name in self._due(trainer.global_step):
                self.checkpoints.save_if_missing(
                    name, state.saved_at(), trainer.weights(), trainer.averages()
                )
        self.ranks.wait()

    def begin(self, subjects: Sequence[Subject]) -> None:
        """Note what the run is made of, before its first update."""
        self.trainer.require_equal_weights()
        self.folder.note_run(self.origin)
        self.metrics = self.folder.metrics(self.trainer.global_step)
        self.folder.states.start_clock()
        counts = [len(subject.pictures) for subject in subjects]
        of = f" of {len(subjects)} subjects ({', '.join(map(str, counts))})" if len(subjects) > 1 else ""
        text = "training %.1fM values on %d images%s: %d updates; compiling, the first takes a while"
        updates = self.progress.total_updates
        logger.info(text, self.trainer.trained_values / 1e6, sum(counts), of, updates)

    def write(self, report) -> None:
        """Of every update: its metrics, and once in a while a log line."""
        self.metrics.write(dataclasses.asdict(report))
        if report.global_step % self.options.callback_size == 0 or report.skipped:
            logger.info(report.line())

    def save_if_due(self, update: int, stops: bool) -> None:
        """The state, then, at the end of an epoch, its checkpoint: resumed between them, a run writes the
        checkpoint first.

        Raises:
            ValueError, FloatingPointError: the weights are not equal in all processes, or not finite; they
                are not saved.
        """
        due, every = self._due(update, stops), self.options.save_every
        # what follows compiles once more: where that takes too much memory, nothing is to be lost
        is_before_stop = update == self.progress.text_stop and self.options.save_state_minutes is not None
        keeps_state = stops or is_before_stop or bool(every and update % every == 0)
        if not keeps_state and not due:
            return
        self.trainer.agree_on_weights()
        self.trainer.require_finite_weights()
        if not self.ranks.is_first:
            return
        if keeps_state or self.folder.states.is_due(run_ends=update == self.progress.total_updates):
            self.save_state()
        for name in due:
            self.checkpoints.save(name, self.trainer.weights(), self.trainer.averages())
        if stops:
            self._say_how_to_draw()

    def _say_how_to_draw(self) -> None:
        """Where there is a state, but no checkpoint yet."""
        if self.ranks.is_first and not self.checkpoints.are_there():
            averaged = " --base_was_averaged" * self.options.use_ema_weights
            logger.info(
                "to draw with what it has learned so far: python scripts/weights_of_state.py %s %s %s%s",
                self.folder.states.paths()[-1], self.options.checkpoint, self.folder.path / "so_far.ckpt",
                averaged,
            )  # fmt: skip

    def say_that_all_is_done(self) -> None:
        self.progress.say_that_all_is_done()
        self._say_how_to_draw()

    def _due(self, update: int, stops: bool = False) -> list[str]:
        """The names of the checkpoints that belong to an update, or to a stop after it."""
        epoch, every = self.progress.epoch_to_save(update), self.options.save_weights_every
        # the additions of a LoRA are a small file
        is_step = bool(every and update % every == 0) or (stops and bool(every or self.checkpoints.lora))
        return [f"epoch_{epoch}"] * bool(epoch) + [f"step_{update}"] * is_step

    def save_state(self) -> None:
        if self.ranks.is_first:
            self.folder.states.save(*self.trainer.state(), self.origin)

    def failed(self, error: FloatingPointError) -> FloatingPointError:
        """The error with how to continue; where it says that the weights are good, they are saved first."""
        if getattr(error, "weights_are_good", False):
            self.save_state()
            self.ranks.wait()  # if one process exits early, the launcher kills the rest
        return FloatingPointError(f"{error}; {self.folder.states.advice()}")

    def end(self) -> None:
        """Note that the run is complete, and say how to use what it has made."""
        self.folder.note_run(self.origin, ended=self.progress.total_updates)
        path = self.checkpoints.paths(f"epoch_{self.progress.epochs}", self.trainer.averages() is not None)[
            -1
        ]
        flags = [f"--ckpt_path {path}"]
        if self.options.model_config != "auto":
            flags.insert(0, f"--config {self.options.model_config}")
        if self.checkpoints.lora:
            flags[-1] = f"--ckpt_path {self.options.checkpoint} --lora_ckpt_path {path}"
            flags += ["--zero_terminal_snr"] * self.options.zero_terminal_snr
            if self.options.train_token is not None:
                flags.append(f"--embedding_path {embedding_beside(path)}")
        logger.info("done; generate images with: python text_to_image.py %s --prompt ...", " ".join(flags))
