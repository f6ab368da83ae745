"""The output folder of a run: all that a training leaves on the disk. It knows no network."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ldm.command_line import start_logging
from ldm.config import ModelConfig
from ldm.fields import OPTIMIZERS
from ldm.files import cache_folder, lock, remove_partial_files, write_text
from ldm.options import TrainOptions
from ldm.ranks import Ranks
from ldm.run.checkpoints import Checkpoints, own_checkpoints
from ldm.run.recipe import Start, find_start, results, resumes_here, write_record
from ldm.run.states import States
from ldm.values import ConfigError

logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run. Of several processes the first writes and the others look.

    Attributes:
        states, checkpoints: what is in it.
        latents: the cache of encoded images, which all runs of this user share.
    """

    def __init__(self, options: TrainOptions, ranks: Ranks) -> None:
        self.path, self.options, self.ranks = Path(options.output_path), options, ranks
        self.latents = cache_folder() / "latents"
        self.states = States(self.path / "states", options.keep_states, options.save_state_minutes)
        self.checkpoints = Checkpoints(
            self.path, options.keep_weights, options.save_format, options.save_dtype
        )
        self._lock = None

    @classmethod
    def open(cls, options: TrainOptions, ranks: Ranks) -> "RunFolder":
        """Lock the folder, log into it, and remove what killed processes have left half written; with
        --dry_run only look.

        Raises:
            ConfigError: an earlier run has left results there, and is not resumed.
            ValueError: another process is writing into it.
        """
        folder = cls(options, ranks)
        if options.dry_run:
            start_logging(options.log_level if ranks.is_first else "WARNING")
            folder._require_no_other_run()
        elif ranks.is_first:
            folder._take()
            for path in (folder.path, folder.states.folder):
                remove_partial_files(path, is_locked=True)
            classes = [Path(its.class_data_dir) for its in options.subjects if its.class_data_dir]
            for path in (*classes, folder.latents):
                remove_partial_files(path)
        else:
            start_logging("WARNING", who=f"rank {ranks.rank} ")
        ranks.wait()
        return folder

    def _take(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock(self.path / ".lock")
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another run is writing into it; give another folder or wait for its end"
            ) from None
        except OSError as error:
            if not (self.path / ".lock").exists():
                raise
            logger.warning("%s: cannot be locked (%s); start no second run there", self.path, error)
        self._require_no_other_run()
        start_logging(self.options.log_level, self.path / "train.log")

    def _require_no_other_run(self) -> None:
        earlier = results(self.path)
        if earlier and not resumes_here(self.options.resume, self.path):
            raise ConfigError(
                f"output_path {self.path}: holds {earlier[-1]} of an earlier run; give another folder, or "
                f"--resume=latest "
                "to continue it"
            )

    def find_start(self) -> Start:
        """Where --resume begins: the same place in all processes.

        Raises ConfigError, or ValueError where they differ.
        """
        start = find_start(self.options.resume, self.path, self.states)
        self.ranks.require_equal(
            [start.summary()], "the states to resume from (do all see the same output_path?)"
        )
        return start

    def note_options(self, used: TrainOptions, config: ModelConfig) -> None:
        """Write the options as they are used, nothing left open, and the model configuration."""
        if self.ranks.is_first:
            effective = {"options": dataclasses.asdict(used), "model": dataclasses.asdict(config)}
            if used.concepts:
                effective["concepts"] = [dataclasses.asdict(concept) for concept in used.subjects]
            write_text(self.path / "effective_config.json", json.dumps(effective, indent=2) + "\n")

    def note_run(self, origin: dict, ended: int | None = None) -> None:
        """Note what the run is made of; or that it has ended, and with which update."""
        if self.ranks.is_first:
            write_record(self.path, origin, ended)

    def space(self, values: Sequence[int], to_come: int, start: Start) -> tuple[int, int]:
        """The bytes that checkpoints and states to come need, and those that are free. Says before hours are
        spent where they will not fit.

        Args:
            values: how many the whole model has, and how many are trained.
            to_come: epochs that still leave checkpoints.
        """
        there = (len(own_checkpoints(self.path)), len(self.states.paths())) if start.state else (0, 0)
        needed = space_needed(self.options, sizes_of(self.options, *values[:2]), to_come, *there)
        place = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if needed > free and self.ranks.is_first:
            logger.warning(
                "%s: checkpoints and states to come need up to %.1f GB, %.1f GB are free: make room, or give "
                "--keep_weights=1, or --save_state_minutes=None (a state only when stopped)",
                self.path, needed / 1e9, free / 1e9,
            )  # fmt: skip
        return needed, free

    def metrics(self, global_step: int) -> "MetricsFile":
        return MetricsFile.open(self.path / "metrics.jsonl" if self.ranks.is_first else None, global_step)


def sizes_of(options: TrainOptions, values: int, trained_values: int) -> tuple[int, int, int]:
    """Bytes of the checkpoints of an epoch, of a saved state, and of the frozen networks that are set aside.

    The weights, with EMA twice, in --save_dtype; the trained ones, what the optimizer keeps of them, and
    averages in float32. With LoRA there is nothing but the trained ones.
    """
    state = int(4 * trained_values * (1 + OPTIMIZERS[options.optim] + options.use_ema))
    if options.use_lora:
        return (2 if options.lora_fp16 else 4) * trained_values * (1 + options.use_ema), state, 0
    frozen = (values - trained_values) * options.cache_latents
    size = 4 if options.save_dtype == "float32" else 2
    return size * values * (1 + options.use_ema), state, 4 * frozen


def space_needed(
    options: TrainOptions,
    sizes: tuple[int, int, int],
    to_come: int,
    checkpoints_there: int = 0,
    states_there: int = 0,
) -> int:
    """The most bytes that a run takes beyond what is there, if it is not stopped, with a state before every
    checkpoint.

    Each file is written whole before an older one goes. A stop within the last epoch takes a state more;
    weights saved every N updates (--save_weights_every) take as many checkpoints more as are kept.

    Args:
        sizes: of `sizes_of`; the frozen networks take space of their own while no checkpoint holds them yet.
        to_come: epochs that still leave checkpoints.
        checkpoints_there, states_there: how many epochs' checkpoints, and states, are on the disk.
    """
    checkpoint, state, frozen = sizes
    has_states = options.save_state_minutes is not None or options.save_every
    has_one_at_the_end = options.save_state_minutes == 0 or options.save_every
    checkpoints, states, most = checkpoints_there, states_there, 0
    for number in range(to_come):
        if has_states and (number < to_come - 1 or has_one_at_the_end):
            most = max(most, checkpoints * checkpoint + (states + 1) * state + frozen)
            states = min(states + 1, options.keep_states)
        most = max(most, (checkpoints + 1) * checkpoint + states * state + frozen)
        checkpoints, frozen = min(checkpoints + 1, options.keep_weights), 0
    most += checkpoint * (options.keep_weights + 1) * bool(options.save_weights_every)
    return most - checkpoints_there * checkpoint - states_there * state if to_come else 0


class MetricsFile:
    """Reports as JSON lines. Without a file nothing is written."""

    def __init__(self, file: IO | None = None) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path | None, global_step: int) -> "MetricsFile":
        """Append to what is there; what an earlier start wrote after update `global_step` is dropped, and a
        line that was cut short.
        """
        if path and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if (step := _step_of(line)) and step <= global_step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        return cls(open(path, "a", encoding="utf-8", buffering=1) if path else None)

    def write(self, report: dict) -> None:
        if self._file:
            finite = {name: value if math.isfinite(value) else None for name, value in report.items()}
            self._file.write(json.dumps(finite) + "\n")


def _step_of(line: str) -> int | None:
    """The update that a line of reports is of, or None where it is no whole line."""
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError):
        return None
