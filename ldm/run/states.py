"""The saved states of a run: all that its next update depends on, so that a stopped run continues as if it
had not been.

A state is a folder `step_<update>` with `state.ckpt` (trained weights, Adam's moments, with EMA the averages)
and `manifest.json` (how far the run is, what it was made of, and the SHA-256 of the other file). A state
appears whole or not at all. States are saved between two updates, when no gradients are being accumulated.
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np

from ldm.files import folder_appears_whole, sha256_of, write_text
from ldm.weights.source import open_weights
from ldm.weights.writing import save_weights

FORMAT = 2
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """A state that was found whole.

    Attributes:
        progress: counters of the trainer.
        origin: what the run was made of: options, model configuration, fingerprints.
    """

    path: Path
    progress: dict
    origin: dict

    def arrays(self) -> Mapping[str, np.ndarray]:
        """By parameter name; each is read when it is asked for.

        The file is open as long as this object is there.
        """
        return open_weights(self.path / "state.ckpt").arrays

    def saved_at(self) -> int:
        """When it was written, in ns of the file system's clock."""
        return (self.path / "manifest.json").stat().st_mtime_ns


def read_state(path: Path) -> State:
    """Find a state, and compare its checksum. Raises ValueError where something is missing or damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        if sha256_of(path / "state.ckpt") != manifest["sha256"]:
            raise ValueError("state.ckpt is not what was written: its SHA-256 differs")
        return State(path, manifest["progress"], manifest["origin"])
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
        """Whether a checkpoint has a state beside it now.

        At the end of the run only if each has: nothing is left to do.
        """
        if self.minutes is None:
            return False
        return self.minutes == 0 or (not run_ends and time.monotonic() - self._last >= 60 * self.minutes)

    def paths(self) -> list[Path]:
        """Complete states, the oldest first."""
        there = [path for path in self.folder.glob("step_*") if path.is_dir()]
        found = [path for path in there if re.fullmatch(r"step_\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

    def latest(self) -> State | None:
        """The newest state that is whole, or None; damaged ones are named in the log."""
        for path in reversed(self.paths()):
            try:
                return read_state(path)
            except ValueError as error:
                logger.warning("skipping damaged state: %s", error)
        return None

    def save(self, arrays: Mapping[str, ms.Tensor], progress: dict, origin: dict) -> Path:
        """Write a state, and remove those that are no longer kept.

        First removes states of later updates: after resuming from an older state they belong to an abandoned
        run.
        """
        path = self.folder / f"step_{progress['global_step']:08d}"
        with folder_appears_whole(path) as partial:
            digest = save_weights(arrays, partial / "state.ckpt")
            manifest = {"format": FORMAT, "sha256": digest, "progress": progress, "origin": origin}
            write_text(partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            for later in [other for other in self.paths() if other.name >= path.name]:
                shutil.rmtree(later)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        self.start_clock()
        logger.info("saved %s", path)
        return path

    def advice(self) -> str:
        """How to continue after a failure."""
        paths = self.paths()
        if not paths:
            return "no state was saved before"
        return (
            f"the last good state is {paths[-1]}: continue from it with --resume={paths[-1]} "
            f"--allow_changed_options=True"
        )
