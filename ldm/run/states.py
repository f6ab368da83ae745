"""The saved states of a run: all that its next step depends on, so that a run that was stopped goes on as if it had not been.

A state is a folder `step_<update>` with `state.ckpt` (trained weights, Adam's moments, with EMA the averages) and
`manifest.json` (how far the run is, what it was made of, and the SHA-256 of the other file). A state appears whole or not
at all: it is written under a hidden name, flushed to the disk, and renamed. States are saved between two updates, when no
gradients are being accumulated.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np

from ldm import device as runtime
from ldm.options import TrainOptions
from ldm.weights.checkpoint import read_checkpoint, recorded_digests, save_weights, sha256_of, to_disk, write_digests

FORMAT = 2
WEIGHTS = re.compile(r"dreambooth_epoch_(\d+)(_ema)?\.ckpt")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """A state that was read and found whole.

    Attributes:
        arrays: by parameter name; each is read when it is asked for.
        progress: of Trainer.state.
        origin: what the run was made of: options, model configuration, fingerprints.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    progress: dict
    origin: dict


def read_state(path: Path) -> State:
    """Read a state, after comparing its checksum. Raises ValueError where something is missing or damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        if sha256_of(path / "state.ckpt") != manifest["sha256"]:
            raise ValueError("state.ckpt is not what was written: its SHA-256 differs")
        return State(path, read_checkpoint(path / "state.ckpt"), manifest["progress"], manifest["origin"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a whole state of a run ({error})") from None


class States:
    """The states in a folder.

    Args:
        keep: how many to keep; an older one goes only after a newer one is complete.
        minutes: how long after the last one another is due at a checkpoint; 0: at every one, None: never.
    """

    def __init__(self, folder: Path, keep: int, minutes: float | None = 0) -> None:
        self.folder, self.keep, self.minutes = folder, keep, minutes
        self.start_clock()

    def start_clock(self) -> None:
        """Training starts: the first state is due `minutes` from now."""
        self._last = time.monotonic()

    def is_due(self, run_ends: bool) -> bool:
        """Whether a state belongs to a checkpoint now. At the end of the run only where each has one: there is nothing to continue."""
        if self.minutes is None:
            return False
        return self.minutes == 0 or (not run_ends and time.monotonic() - self._last >= 60 * self.minutes)

    def paths(self) -> list[Path]:
        """Complete states, the oldest first."""
        found = [path for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

    def latest(self) -> State | None:
        """The newest state that is whole, or None; damaged ones are named in the log."""
        for path in reversed(self.paths()):
            try:
                return read_state(path)
            except ValueError as error:
                logger.warning("passed over: %s", error)
        return None

    def save(self, arrays: Mapping[str, ms.Tensor], progress: dict, origin: dict) -> Path:
        """Write a state, and remove those that are no longer kept.

        Those of later updates go, too, before it appears: the run was taken up again before them, and they are not of its present course.
        """
        path = self.folder / f"step_{progress['global_step']:08d}"
        partial = self.folder / f".{path.name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            digest = save_weights(arrays, partial / "state.ckpt")
            manifest = {"format": FORMAT, "sha256": digest, "progress": progress, "origin": origin}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            to_disk(partial / "manifest.json"), to_disk(partial)
            for later in [other for other in self.paths() if other.name >= path.name]:
                shutil.rmtree(later)
            os.replace(partial, path)
            to_disk(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        self.start_clock()
        return path

    def remove_litter(self) -> None:
        """What a run that was killed while it wrote has left."""
        for partial in self.folder.glob(".step_*.part"):
            shutil.rmtree(partial)


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files, in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def own_weights(folder: Path) -> dict[int, list[Path]]:
    """Epoch to its checkpoints in a run's folder, of those that the run has recorded: others are not its own."""
    epochs: dict[int, list[Path]] = {}
    for name in recorded_digests(folder):
        if match := WEIGHTS.fullmatch(name):
            epochs.setdefault(int(match[1]), []).append(folder / name)
    return epochs


def remove_old_weights(folder: Path, epoch: int, keep: int) -> list[Path]:
    """Remove the run's own checkpoints of epochs up to `epoch`, but for the `keep` newest. Returns which those were."""
    epochs = own_weights(folder)
    old = [path for number in sorted(number for number in epochs if number <= epoch)[:-keep] for path in epochs[number]]
    for path in old:
        path.unlink(missing_ok=True)
    if old:
        write_digests(folder, {name: digest for name, digest in recorded_digests(folder).items() if folder / name not in old})
    return old


def space_needed(
    options: TrainOptions, sizes: tuple[int, int, int], to_come: int, weights_there: int = 0, states_there: int = 0
) -> int:  # fmt: skip
    """The most bytes that a run takes beyond what is there, if it is not stopped, with a state before every checkpoint where they are saved.

    Each file is written whole before an older one goes. A stop within the last epoch takes a state more.

    Args:
        sizes: bytes of the checkpoints of one epoch, of one state, and of the frozen networks while no checkpoint holds them yet.
        to_come: epochs that still leave checkpoints.
        weights_there, states_there: how many epochs' checkpoints, and states, are on the disk.
    """
    checkpoint, state, frozen = sizes
    has_states = options.save_state_minutes is not None or options.save_every
    has_one_at_the_end = options.save_state_minutes == 0 or options.save_every
    weights, states, most = weights_there, states_there, 0
    for number in range(to_come):
        if has_states and (number < to_come - 1 or has_one_at_the_end):
            most = max(most, weights * checkpoint + (states + 1) * state + frozen)
            states = min(states + 1, options.keep_checkpoints)
        most = max(most, (weights + 1) * checkpoint + states * state + frozen)
        weights, frozen = min(weights + 1, options.keep_weights), 0
    return most - weights_there * checkpoint - states_there * state if to_come else 0


class MetricsFile:
    """Reports as JSON lines; those of an earlier start after update `global_step` are dropped, and a line that was cut short."""

    def __init__(self, path: Path, global_step: int) -> None:
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            runtime.write_text(path, "".join(f"{line}\n" for line in lines if (step := _step_of(line)) and step <= global_step))
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, report: dict) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in report.items()}
        self._file.write(json.dumps(finite) + "\n")


def _step_of(line: str) -> int | None:
    """The update that a line of reports is of, or None where it is no whole line."""
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError):
        return None
