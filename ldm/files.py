"""Files that appear whole or not at all; locks, checksums, and where this program keeps what it can make
again.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, BinaryIO

from ldm.device import is_dry_run

PARTIAL = re.compile(r"\..+\.(\d+)\.part")
logger = logging.getLogger(__name__)


def partial_path(path: Path) -> Path:
    """The hidden name under which `path` is written: no other process has it, and it says whose it is."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


@contextlib.contextmanager
def appears_whole(path: Path, *, replace: bool = True, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name when the block ends. After an error nothing of it is left.

    Args:
        replace: take the place of a file of that name; otherwise FileExistsError is raised.
        durable: return only when content and name are on the disk, so that they outlive a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            _name_if_free(partial, path)
        if durable:
            _to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_appears_whole(path: Path) -> Iterator[Path]:
    """A folder to write durable files into, which gets its name when the block ends."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _name_if_free(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)  # unlike a rename, never over a file that is there
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path}: exists already") from None
        os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    with appears_whole(path) as file:
        file.write(text.encode())


def remove_partial_files(folder: Path, is_locked: bool = False) -> None:
    """Remove what processes that were killed while they wrote have left in a folder.

    Args:
        is_locked: this process has the folder for itself. Otherwise only what processes of this machine that
            are gone have left.
    """
    for path in folder.glob(".*.part"):
        match = PARTIAL.fullmatch(path.name)
        if match and (is_locked or _is_of_a_process_that_is_gone(path.name, match[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_of_a_process_that_is_gone(name: str, process: str) -> bool:
    is_own_machine = name.endswith(f".{socket.gethostname()}.{process}.part")
    return is_own_machine and Path("/proc/self").exists() and not Path("/proc", process).exists()


def lock(path: Path) -> IO:
    """A lock on a file, held until the object that is returned is closed, or this process ends in whatever
    way.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be made, or its file system has no locks.
    """
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def folder_to_itself(folder: Path, others: str) -> Iterator[bool]:
    """A block in which no other process is that asks for the same folder: this one waits for its turn, which
    also comes when the other is killed. Where the file system has no locks nobody waits.

    Gives whether it had to wait.

    Args:
        others: what the log says of another process that has it.
    """
    handle, waits = os.open(folder, os.O_RDONLY), False
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits:
                    logger.info("%s: %s; waiting for its end", folder, others)
                waits = True
                time.sleep(1)  # a wait within the system call would not let signals through
            except OSError:
                break
        yield waits
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Where this program keeps what it can make again: under the user's cache folder; what a dry run makes,
    which computes nothing, apart from the rest.
    """
    given = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(given):  # a relative one is to be ignored; nor has everyone in a container a home
        given = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    folder = Path(given) / "dreambooth-mindspore"
    return folder / "dry_run" if is_dry_run() else folder


def sha256_of(path: Path) -> str:
    """Of a file's content; a file that has not changed since is read once only."""
    status = os.stat(path)
    return _sha256(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=64)
def _sha256(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def short_names(paths: Sequence[Path]) -> list[str]:
    """Of weight files or folders: the names without the kind, and with the folder before them where several
    have one.
    """
    stems = [path.name.removesuffix(".ckpt").removesuffix(".safetensors") for path in paths]
    if len(set(stems)) < len(stems) and len({path.name for path in paths}) == len(paths):
        stems = [path.name for path in paths]
    return [
        stem if stems.count(stem) == 1 else f"{path.absolute().parent.name}_{stem}"
        for path, stem in zip(paths, stems)
    ]


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files, in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.fsencode(path.name) + f" {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _to_disk(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where its file system can say so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of drives in a network or in user space
            raise
    finally:
        os.close(handle)
