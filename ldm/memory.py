"""How much memory there is, and giving back what is no longer used."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

LARGE = 8 << 30  # bytes: a training that needs so much is one of a full-size model


def release_memory() -> None:
    """Give the memory of unused objects back to the system."""
    gc.collect()  # cells refer to each other in cycles
    # glibc keeps what was freed, and MindSpore's own pools cannot use that: of 400 MB of freed weights none
    # went back.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def training_bytes(values: int, trained_values: int, kept: float = 2) -> int:
    """The memory that a training may need, of networks with so many values.

    Weights, and of those that are trained a gradient and what the optimizer keeps, of AdamW two moments. With
    the activations and all else that a full-size step needs, training all values of the UNet took 5.8 times
    their size, and with what is left of compiling, generating and encoding up to 7.5.
    """
    return int(4 * (4.5 * values + (1 + kept) * trained_values))


def memory_is_low(needed: int) -> bool:
    """Whether so many bytes are more than this process has and can get; False without /proc."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    except OSError:
        return False
    return needed > available + own_memory()


def own_memory() -> int:
    """The bytes of memory that this process has; 0 without /proc."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
