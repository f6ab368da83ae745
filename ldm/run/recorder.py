"""What a training leaves on the disk while it goes on: metrics, log lines, states and checkpoints."""

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ldm.command_line import command_to_resume
from ldm.options import TrainOptions
from ldm.run.boards import Boards
from ldm.run.checkpoints import embedding_beside
from ldm.run.folder import RunFolder
from ldm.run.report import Commands, RunReport
from ldm.run.states import State
from ldm.run.validation import Draws, Validation
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
    def averaged(self) -> AbstractContextManager: ...


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
        draws: makes validation images, where they are wanted.
        is_stopping: whether a signal wants the run to stop, as far as this process knows.
    """

    def __init__(
        self, folder: RunFolder, trainer: Trained, progress: Counting, origin: dict,
        draws: Draws | None = None, is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.folder, self.checkpoints, self.trainer = folder, folder.checkpoints, trainer
        self.progress, self.origin, self.options, self.ranks = progress, origin, folder.options, folder.ranks
        self.validation = Validation(
            folder.path, self.options, draws if self.ranks.is_first else None, is_stopping
        )
        self.boards: Boards | None = None
        self.report: RunReport | None = None  # of the first process

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

    def begin(self, options: TrainOptions, subjects: Sequence[Subject]) -> None:
        """Note what the run is made of, before its first update.

        Args:
            options: as they are used, nothing left open.
        """
        self.trainer.require_equal_weights()
        self.folder.note_run(self.origin)
        self.metrics = self.folder.metrics(self.trainer.global_step)
        self.folder.states.start_clock()
        counts = [len(subject.pictures) for subject in subjects]
        of = f" of {len(subjects)} subjects ({', '.join(map(str, counts))})" if len(subjects) > 1 else ""
        text = "training %.1fM values on %d images%s: %d updates; compiling, the first takes a while"
        updates = self.progress.total_updates
        logger.info(text, self.trainer.trained_values / 1e6, sum(counts), of, updates)
        if not self.ranks.is_first:
            return
        update = self.trainer.global_step
        if self.options.report_to == "tensorboard":
            self.boards = Boards(self.folder.path / "tensorboard", update)
        self.report = RunReport(
            self.folder.path, options, self.options, subjects, self.progress.epochs, updates
        )
        self.validation.begin(update)
        self._draw(update)
        self._tell("running", f"update {update} of {updates}")

    def _draw(self, update: int) -> bool:
        """The validation images of an update, if it has any; whether there are new ones."""
        is_last = update == self.progress.total_updates
        if not self.validation.is_due(update, bool(self._due(update)), is_last):
            return False
        grid = self.validation.draw(update, self.trainer)
        if grid is not None and self.boards:
            self.boards.write_grid(grid, update)
        return grid is not None

    def _tell(self, state: str, said: str) -> None:
        """Write the report."""
        if self.report:
            self.report.write(state, said, self._commands())

    def _commands(self) -> Commands:
        checkpoints, options = self.checkpoints, self.options
        resume = None
        if self.folder.states.paths():
            size = self.ranks.size
            several = f"# as you started these {size} processes, and with --resume=latest"
            resume = command_to_resume() if size == 1 else several
        if not (path := checkpoints.newest()):
            return Commands(resume=resume)
        whole = (
            path.with_suffix(".safetensors")
            if path.suffix == ".ckpt"
            else path.with_name(f"{path.name}_file.safetensors")
        )
        script = ["scripts/convert_checkpoint.py", path, whole]
        if checkpoints.lora:
            whole = path.with_name(f"{path.stem}_merged.safetensors")
            script = ["scripts/merge_lora.py", options.checkpoint, path, whole]
        return Commands(self._how_to_draw(path), resume, f"python {shlex.join(map(str, script))}")

    def write(self, report) -> None:
        """Of every update: its metrics, and once in a while a log line."""
        self.metrics.write(dataclasses.asdict(report))
        if self.boards:
            self.boards.write(dataclasses.asdict(report))
        if report.global_step % self.options.callback_size == 0 or report.skipped:
            logger.info(report.line())

    def finish(self, update: int, stops: bool) -> None:
        """After every update: what is due on the disk, then images of it; these wait where the run stops.
        Raises as `save_if_due` does.
        """
        has_saved = self.save_if_due(update, stops)
        if not self.ranks.is_first:
            return
        has_drawn = not stops and self._draw(update)
        if stops:
            self._tell("stopped", f"stopped after update {update} of {self.progress.total_updates}")
        elif has_saved or has_drawn:
            self._tell("running", f"update {update} of {self.progress.total_updates}")

    def save_if_due(self, update: int, stops: bool) -> bool:
        """The state, then, at the end of an epoch, its checkpoint: resumed between them, a run writes the
        checkpoint first. Returns whether anything was due.

        Raises:
            ValueError, FloatingPointError: the weights are not equal in all processes, or not finite; they
                are not saved.
        """
        due, every = self._due(update, stops), self.options.save_every
        # what follows compiles once more: where that takes too much memory, nothing is to be lost
        is_before_stop = update == self.progress.text_stop and self.options.save_state_minutes is not None
        keeps_state = stops or is_before_stop or bool(every and update % every == 0)
        if not keeps_state and not due:
            return False
        self.trainer.agree_on_weights()
        self.trainer.require_finite_weights()
        if not self.ranks.is_first:
            return True
        if keeps_state or self.folder.states.is_due(run_ends=update == self.progress.total_updates):
            self.save_state()
        for name in due:
            self.checkpoints.save(name, self.trainer.weights(), self.trainer.averages())
        if stops:
            self._say_how_to_draw()
        return True

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

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """A block whose FloatingPointError says how to continue; where it says that the weights are good,
        they are saved first. The report says of any error that the run has failed.
        """
        try:
            yield
        except FloatingPointError as error:
            if getattr(error, "weights_are_good", False):
                self.save_state()
                self.ranks.wait()  # if one process exits early, the launcher kills the rest
            self._tell("failed", f"failed: {error}")
            raise FloatingPointError(f"{error}; {self.folder.states.advice()}") from None
        except Exception as error:
            self._tell("failed", f"failed: {error}")
            raise

    def end(self) -> None:
        """Note that the run is complete, and say how to use what it has made."""
        self.folder.note_run(self.origin, ended=self.progress.total_updates)
        names = self.checkpoints.paths(f"epoch_{self.progress.epochs}", self.trainer.averages() is not None)
        self._tell("complete", f"complete: {self.progress.total_updates} updates")
        if self.boards:
            self.boards.close()
        logger.info("done; generate images with: %s", self._how_to_draw(names[-1], "..."))
        if self.report:
            logger.info("what it learned from, draws, and how it went: %s", self.folder.path / "report.html")

    def _how_to_draw(self, path: Path, prompt: str | None = None) -> str:
        """The command that draws with a checkpoint."""
        options = self.options
        words = ["--ckpt_path", path]
        if self.checkpoints.lora:
            words = ["--ckpt_path", options.checkpoint, "--lora_ckpt_path", path]
            words += ["--zero_terminal_snr"] * options.zero_terminal_snr
            if options.train_token is not None:
                words += ["--embedding_path", embedding_beside(path)]
        if options.model_config != "auto":
            words = ["--config", options.model_config, *words]
        prompt = prompt or shlex.quote(f"{options.subjects[0].instance_prompt} on the beach")
        return f"python text_to_image.py {shlex.join(map(str, words))} --prompt {prompt}"
