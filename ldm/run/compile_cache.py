"""Compiled graphs kept for the next start; and the one restart that frees the memory which compiling used."""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import IO

from ldm import files
from ldm.device import is_dry_run, soc
from ldm.memory import LARGE, memory_is_low
from ldm.operators import library

COMPLETE = "complete"  # the file that says that a folder of compiled graphs is whole
RESTARTED = "DREAMBOOTH_STARTED_AGAIN"
logger = logging.getLogger(__name__)


class CompileCache:
    """A folder of compiled graphs, for this process alone.

    Environment variables are written for MindSpore, which reads them.

    MindSpore names cached graphs by the order in which they are compiled and compares only the script's own
    sources. So each combination of all that shapes the graphs or their order has a folder of its own, and of
    two runs that start together only the first uses it (the lock dies with its process).
    MS_COMPILER_CACHE_PATH says where; otherwise it is the user's cache folder.

    Attributes:
        folder: of this run's graphs, or None: nothing is kept.
    """

    def __init__(self, folder: Path | None = None, lock: IO | None = None) -> None:
        self.folder, self._lock, self._are_complete = folder, lock, False
        self._given = os.environ.get("MS_COMPILER_CACHE_PATH")
        os.environ["MS_COMPILER_CACHE_ENABLE"] = "1" if folder else "0"
        if folder:
            os.environ["MS_COMPILER_CACHE_PATH"] = str(folder)

    @classmethod
    def open(cls, is_wanted: bool, facts: dict, after: object = None) -> "CompileCache":
        """Keep the graphs compiled from now on for the next start with the same code, versions and `facts`.

        Args:
            is_wanted: otherwise nothing is kept.
            after: what had to be compiled before: how many graphs that took may differ from start to start,
                so they must not be numbered. Not looked at.
        """
        if not is_wanted:
            return cls()
        root = Path(os.environ.get("MS_COMPILER_CACHE_PATH") or files.cache_folder())
        folder = root / _key(facts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = files.lock(folder / "lock")
        except OSError as error:
            reason = "another run uses it" if isinstance(error, BlockingIOError) else error
            logger.info("compile cache not used (%s)", reason)
            return cls()
        if not (folder / COMPLETE).exists():  # of a process that was killed while it wrote them
            for entry in set(folder.iterdir()) - {folder / "lock"}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        logger.info("compile cache: %s", folder)
        return cls(folder, lock)

    def mark_complete(self) -> None:
        """All graphs of this run are compiled: note it on the disk, so that the next start uses them."""
        if self.folder and not self._are_complete:
            self._are_complete = True
            with contextlib.suppress(OSError):
                (self.folder / COMPLETE).touch()

    def restart_if_large(self, compile_all: Callable[[], None], needed: int, is_alone: bool = True) -> None:
        """Compile, then start the command once more, where a training needs so many bytes that what compiling
        took counts, 5 GB at full size: MindSpore never gives that back.

        Where the graphs are there already, only where memory is low. Does nothing in the second start, nor
        without a folder, in which the graphs would be found there.

        Args:
            is_alone: of several processes none can start again; nor would it help but on a CPU.
        """
        if not is_alone or not self.folder or os.environ.get(RESTARTED) or needed < LARGE:
            return
        if (self.folder / COMPLETE).exists() and not memory_is_low(needed):
            return
        logger.info("compiling first, then starting once more: the memory that compiling takes is free then")
        compile_all()
        self.mark_complete()
        os.environ[RESTARTED] = "1"
        if self._given is None:
            del os.environ["MS_COMPILER_CACHE_PATH"]
        else:
            os.environ["MS_COMPILER_CACHE_PATH"] = self._given
        logging.shutdown()
        # with Python's variables: MindSpore sets OMP_NUM_THREADS to 1 for itself, where only C sees it
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)


def _key(facts: dict) -> str:
    """A name for the graphs of these facts, this code, these versions and this device."""
    versions = sys.version, version("mindspore"), os.environ.get("ONEDNN_MAX_CPU_ISA"), soc(), is_dry_run()
    digest = hashlib.sha256(repr((sorted(facts.items()), versions)).encode())
    digest.update(str(library()).encode())  # a graph names the file that its operators are in
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]
