"""Arrays in a file, of whatever format: where each one lies, and one at a time.

Knows no format and no network.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np


@dataclass(frozen=True)
class Entry:
    """Where an array lies: its bytes are the pieces (offset, size) of the file, joined."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]]


class ArraysInFile(Mapping):
    """Name to array; every access reads that array from the file, into memory of its own."""

    def __init__(self, file: BinaryIO, entries: Mapping[str, Entry]) -> None:
        self._file, self._entries = file, entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        content, start = np.empty(sum(size for _, size in entry.pieces), np.uint8), 0
        for offset, size in entry.pieces:
            self._file.seek(offset)
            if self._file.readinto(content[start : start + size]) != size:
                raise ValueError(
                    f"{self._file.name}: cut off within {name!r}; was it overwritten while it was read?"
                )
            start += size
        return content.view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def make_entry(
    name: str,
    dtypes: Mapping[str, np.dtype],
    dtype: str,
    shape: tuple[int, ...],
    pieces: list[tuple[int, int]],
) -> Entry:
    """An entry whose bytes fit its shape.

    Raises ValueError where they do not, or `dtypes` lacks the dtype.
    """
    if dtype not in dtypes:
        raise ValueError(f"{name!r}: dtype {dtype!r} is not supported")
    needed, found = math.prod(shape) * dtypes[dtype].itemsize, sum(size for _, size in pieces)
    if needed != found or max(shape, default=0) >= 2**63:
        raise ValueError(f"{name!r}: {dtype} of shape {shape} has {needed} bytes, the file has {found}")
    return Entry(dtypes[dtype], shape, pieces)
