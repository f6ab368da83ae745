"""Arrays by name, wherever they come from: in a file of whatever format, in memory, or under other names.

Knows no format and no network.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Arrays(Mapping):
    """Name to array, of which shapes and dtypes are known without reading; every access may read a file."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> np.dtype: ...


def cast(values: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Rounded to nearest even; what is too large becomes Inf. No copy where nothing changes."""
    with np.errstate(over="ignore"):
        return values if dtype is None else values.astype(dtype, copy=False)


def as_numpy(array) -> np.ndarray:
    """An array, or a tensor of MindSpore as one."""
    return array if isinstance(array, np.ndarray) else array.asnumpy()


def is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def is_finite(values: np.ndarray) -> bool:
    """Without an array of booleans: no sum in float64 of finite float32 values overflows, and NaN and Inf
    stay.
    """
    with np.errstate(invalid="ignore"):  # Inf - Inf
        return bool(np.isfinite(values.sum(dtype=np.float64)))


def examples(names) -> str:
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


class ArraysInMemory(Arrays):
    """Arrays that are there already."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


@dataclass(frozen=True)
class Entry:
    """Where an array lies: its bytes are the pieces (offset, size) of the file, joined.

    Attributes:
        stride: of each axis, in values, where they do not lie in the order of the axes.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]]
    stride: tuple[int, ...] | None = None


class ArraysInFile(Arrays):
    """Name to array; every access reads that array from the file, into memory of its own.

    Attributes:
        metadata: texts that the file holds beside them.
    """

    metadata: dict[str, str] = {}

    def __init__(self, file: BinaryIO, entries: Mapping[str, Entry]) -> None:
        self._file, self._entries = file, entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

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
        values = content.view(entry.dtype)
        if entry.stride is None:
            return values.reshape(entry.shape)
        steps = [step * entry.dtype.itemsize for step in entry.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, entry.shape, steps))

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


@dataclass(frozen=True)
class Made:
    """How an array is made: of others, joined on their first axis; then the `part`-th of `parts` equal pieces
    of that axis; then reshaped.
    """

    names: Sequence[str]
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1


class Renamed(Arrays):
    """Arrays under other names; those that the model joins or a file splits are made on the way."""

    def __init__(self, arrays: Arrays, made: Mapping[str, Made]) -> None:
        self._arrays, self._made = arrays, made

    def shape(self, name: str) -> tuple[int, ...]:
        return self._made[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.result_type(*(self._arrays.dtype(old) for old in self._made[name].names))

    def __getitem__(self, name: str) -> np.ndarray:
        made = self._made[name]
        pieces = [self._arrays[old] for old in made.names]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if made.parts > 1:
            whole = np.split(whole, made.parts)[made.part]
        return whole.reshape(made.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


class Joined(Arrays):
    """The arrays of several files, each under a prefix of its own, which may be empty."""

    def __init__(self, files: Sequence[tuple[str, Arrays]]) -> None:
        self._places: dict[str, tuple[Arrays, str]] = {}
        for prefix, arrays in files:
            for name in arrays:
                if prefix + name in self._places:
                    raise ValueError(f"{prefix + name!r}: occurs twice")
                self._places[prefix + name] = arrays, name

    def shape(self, name: str) -> tuple[int, ...]:
        arrays, own = self._places[name]
        return arrays.shape(own)

    def dtype(self, name: str) -> np.dtype:
        arrays, own = self._places[name]
        return arrays.dtype(own)

    def __getitem__(self, name: str) -> np.ndarray:
        arrays, own = self._places[name]
        return arrays[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
