"""The process around the networks: environment, device, compile cache, logging. The one place for os.environ.

`prepare_environment` runs on `import ldm`, since some variables count only before mindspore is imported; mindspore
itself is imported by `start_device`, so that --help and a typing error need not wait for it.
"""

import contextlib
import ctypes
import fcntl
import gc
import hashlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)
COMPLETE = "complete"  # the file that says that a folder of compiled graphs is whole
VERSIONS = {"mindspore": ((2, 7), (2, 11)), "numpy": ((1, 25), (2, 0))}  # from the first to before the second
_held_locks = []


def prepare_environment() -> None:
    """Set what must be set before `import mindspore`, never over the user's own setting."""
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    # What MindSpore leaves behind when a graph does not compile goes there, not into the user's folder.
    os.environ.setdefault("MS_OM_PATH", os.path.join(tempfile.gettempdir(), f"mindspore-{os.getuid()}"))


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed: a name that no other process has, and that says whose it is."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def remove_litter(folder: Path) -> None:
    """Remove what processes of this machine that were killed while they wrote have left in a folder."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.part"):
        number = path.name.split(".")[-2]
        if number.isdigit() and Path("/proc/self").exists() and not Path("/proc", number).exists():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    partial = partial_path(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _BarHandler(logging.StreamHandler):
    """Log lines that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging(level: str, log_file: Path | None = None, who: str = "") -> None:
    """Log lines of this program to standard error and, where given, to a file as well; `who` stands before each."""
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no reason for a traceback
    handlers: list[logging.Handler] = [_BarHandler()]
    if log_file:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    logging.basicConfig(level=level, format=f"%(asctime)s {who}%(levelname)s %(message)s", handlers=handlers, force=True)


def start_device(device: str, mode: int) -> str:
    """Import mindspore and choose the device; returns its name.

    Args:
        device: "auto", "Ascend" or "CPU".
        mode: 0 graph mode, 1 PyNative.

    Raises:
        ValueError: MindSpore or NumPy is of a version that does not fit, or a forced device is not there.
    """
    require_versions()
    import mindspore as ms

    os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"  # until enable_compile_cache, whose folders are keyed as MindSpore's is not
    available = _ascend_is_available(ms)
    if device == "Ascend" and not available:
        raise ValueError("device Ascend: MindSpore finds no Ascend device here; give --device CPU or auto")
    chosen = device if device != "auto" else "Ascend" if available else "CPU"
    ms.set_device(chosen, *([int(os.environ["DEVICE_ID"])] if chosen == "Ascend" and "DEVICE_ID" in os.environ else []))
    ms.set_context(mode=ms.PYNATIVE_MODE if mode else ms.GRAPH_MODE)
    logger.info("MindSpore %s on %s", ms.__version__, chosen)
    return chosen


def require_versions() -> None:
    """Raises ValueError where MindSpore or NumPy is missing or of a version that this program does not work with."""
    for package, (first, end) in VERSIONS.items():
        wanted = f"{package} from {first[0]}.{first[1]} to before {end[0]}.{end[1]}"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ValueError(f"{package} is not installed: {wanted} is needed (README, Dependencies)") from None
        numbers = tuple(int(re.match(r"\d*", part)[0] or 0) for part in found.split(".")[:2])
        if not first <= numbers < end:
            raise ValueError(f"{package} {found} does not fit: {wanted} is needed (README, Dependencies)")


def _ascend_is_available(ms) -> bool:
    try:
        return ms.device_context.ascend.device_count() > 0
    except Exception as error:  # no driver: MindSpore raises whatever its loader raised
        logger.debug("no Ascend: %s", error)
        return False


def cache_folder() -> Path:
    """Where this program keeps what it can make again: under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dreambooth-mindspore"


def release_memory() -> None:
    """Give the memory of unused objects back to the system."""
    gc.collect()  # cells refer to each other in cycles
    # glibc keeps what was freed, and MindSpore's own pools cannot use that: of 400 MB of freed weights none went back before.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def lock_folder(folder: Path) -> None:
    """Keep a folder for this process, until it ends in whatever way. Raises ValueError where another process has it."""
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is writing into it; give another folder or wait for its end") from None
    except OSError as error:  # a file system without locks
        logger.warning("%s: cannot be locked (%s); start no second run there", folder, error)
    _held_locks.append(lock)


class Interrupted(SystemExit):
    """SIGINT or SIGTERM, with the exit status that shells give it: 130 or 143."""


class StopSignals:
    """SIGINT and SIGTERM: within `postponed` the first one only sets `received`, otherwise and the second time it raises Interrupted.

    To be made before any thread is started. MindSpore puts a handler of its own for SIGINT in place with every graph that it runs, which
    turns it into SIGTERM. So SIGINT is blocked, and a thread that waits for it passes it on as SIGUSR1.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_postponed = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR1, lambda _, frame: self._handle(signal.SIGINT, frame))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=self._pass_on, daemon=True).start()

    def _pass_on(self) -> None:
        while True:
            signal.sigwait({signal.SIGINT})
            os.kill(os.getpid(), signal.SIGUSR1)

    def _handle(self, number: int, frame) -> None:
        if self.received or not self._is_postponed:
            raise Interrupted(128 + number)
        self.received = number
        logger.info("%s: stopping after this step; once more stops at once", signal.Signals(number).name)

    @contextlib.contextmanager
    def postponed(self):
        self._is_postponed = True
        try:
            yield
        finally:
            self._is_postponed = False


def enable_compile_cache(*facts) -> None:
    """Keep the graphs compiled from now on for the next start with the same code, versions and `facts`.

    MindSpore names cached graphs by the order in which they are compiled and compares only the script's own sources. So
    each combination of all that shapes the graphs or their order has a folder of its own, and of two runs that start
    together only the first uses it (the lock dies with its process). MS_COMPILER_CACHE_PATH says where; otherwise it is
    the user's cache folder.
    """
    root = Path(os.environ.get("MS_COMPILER_CACHE_PATH") or cache_folder())
    digest = hashlib.sha256(repr((facts, sys.version, version("mindspore"), os.environ.get("ONEDNN_MAX_CPU_ISA"))).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    folder = root / digest.hexdigest()[:20]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        logger.info("compile cache not used (%s)", "another run uses it" if isinstance(error, BlockingIOError) else error)
        os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"
        return
    _held_locks.append(lock)
    if not (folder / COMPLETE).exists():  # of a process that was killed while it wrote them
        for entry in set(folder.iterdir()) - {folder / "lock"}:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    os.environ["MS_COMPILER_CACHE_ENABLE"] = "1"
    os.environ["MS_COMPILER_CACHE_PATH"] = str(folder)
    logger.info("compile cache: %s", folder)


def keep_compiled_graphs() -> None:
    """Say that all graphs of this run are compiled: the next start finds none that are half written."""
    if os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1":
        with contextlib.suppress(OSError):
            Path(os.environ["MS_COMPILER_CACHE_PATH"], COMPLETE).touch()


def memory_is_short(trained_bytes: int) -> bool:
    """Whether training weights of this size may leave no room for what compiling leaves behind; False where /proc tells nothing.

    Weights, gradients and two moments are four times their size. With the activations and all else that a full-size step
    needs it was 5.8 times for the UNet, and with what is left of compiling, sampling and encoding up to 7.5.
    """
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
        own = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return False
    return 7.5 * trained_bytes > available + own


def start_again() -> None:
    """Run this command anew in this process's place: MindSpore never gives back what compiling took, 3-5 GB at full size.

    Does nothing the second time, nor without the compile cache, which would not find the graphs there.
    """
    if os.environ.get("DREAMBOOTH_STARTED_AGAIN") or os.environ.get("MS_COMPILER_CACHE_ENABLE") != "1":
        return
    keep_compiled_graphs()
    os.environ["DREAMBOOTH_STARTED_AGAIN"] = "1"
    os.environ["MS_COMPILER_CACHE_PATH"] = str(Path(os.environ["MS_COMPILER_CACHE_PATH"]).parent)  # as enable_compile_cache found it
    logging.shutdown()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
