"""How much memory there is, and giving back what is no longer used."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path


def release_memory() -> None:
    """Give the memory of unused objects back to the system."""
    gc.collect()  # cells refer to each other in cycles
    # glibc keeps what was freed, and MindSpore's own pools cannot use that: of 400 MB of freed weights none
    # went back.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def memory_is_low(trained_bytes: int) -> bool:
    """Whether training weights of this size may leave no room for what compiling leaves behind; False without
    /proc.

    Weights, gradients and two moments are four times their size. With the activations and all else that a
    full-size step needs it was 5.8 times for the UNet, and with what is left of compiling, generating and
    encoding up to 7.5.
    """
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
        own = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return False
    return 7.5 * trained_bytes > available + own
