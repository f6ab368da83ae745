"""Weights written as any program reads them: streamed, whole or not at all.

The official names in a .ckpt of MindSpore or in safetensors; the names of Stability in safetensors; a folder
of diffusers.
"""

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import mindspore as ms
import numpy as np

from ldm.config import ModelConfig
from ldm.files import appears_whole, folder_appears_whole
from ldm.weights.arrays import BFLOAT16, Arrays, ArraysInMemory, Made, Renamed, cast
from ldm.weights.diffusers_folder import WEIGHT_FILES, as_diffusers, folder_files
from ldm.weights.digests import record_digests
from ldm.weights.layouts import STABILITY, as_named_in
from ldm.weights.mindspore_ckpt import CKPT_DTYPES, write_ckpt
from ldm.weights.safetensors_files import write_safetensors
from ldm.weights.source import read_file

SUFFIXES = {"mindspore": ".ckpt", "safetensors": ".safetensors", "stability": ".safetensors", "diffusers": ""}
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
METADATA = {"format": "pt"}  # which older readers of diffusers want


class Tensors(ArraysInMemory):
    """Tensors and arrays; on a CPU a tensor's own memory, no copy."""

    def shape(self, name: str) -> tuple[int, ...]:
        value = self._arrays[name]
        return tuple(value.shape) if isinstance(value, ms.Tensor) else np.asarray(value).shape

    def dtype(self, name: str) -> np.dtype:
        value = self._arrays[name]
        return CKPT_DTYPES[str(value.dtype)] if isinstance(value, ms.Tensor) else np.asarray(value).dtype

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._arrays[name]
        return value.asnumpy() if isinstance(value, ms.Tensor) else np.asarray(value)


class Cast(Renamed):
    """Arrays that are cast, and whose checksums are noted as they are read, if wanted."""

    def __init__(self, arrays: Arrays, dtype: np.dtype | None, notes_checksums: bool) -> None:
        super().__init__(arrays, {name: Made([name], arrays.shape(name)) for name in arrays})
        self._dtype, self._notes, self.checksums = dtype, notes_checksums, {}

    def dtype(self, name: str) -> np.dtype:
        return self._dtype or super().dtype(name)

    def __getitem__(self, name: str) -> np.ndarray:
        values = cast(super().__getitem__(name), self._dtype)
        if self._notes:
            self.checksums[name] = checksum_of(values)
        return values


def checksum_of(values: np.ndarray) -> tuple:
    """Of shape, dtype and bytes."""
    return values.shape, values.dtype, zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def format_of(path: Path) -> str:
    """What a path asks for by its suffix: mindspore, safetensors, or diffusers (none).

    Raises ValueError for another suffix.
    """
    known = {".ckpt": "mindspore", ".safetensors": "safetensors", "": "diffusers"}
    if path.suffix not in known:
        raise ValueError(
            f"{path}: must end with .ckpt (MindSpore), .safetensors, or be a folder's name without a suffix, "
            f"got {path.suffix}"
        )
    return known[path.suffix]


def save_weights(  # noqa: PLR0913 (a file is described by many things)
    weights: Mapping[str, np.ndarray | ms.Tensor], path: Path, record: bool = False, *, to: str | None = None,
    dtype: np.dtype | None = None, config: ModelConfig | None = None, compare: bool = False,
    replace: bool = True, metadata: Mapping[str, str] = METADATA,
) -> str:  # fmt: skip
    """Write a checkpoint; it appears whole or not at all.

    Args:
        weights: by official names.
        record: note its SHA-256 in `checkpoints.sha256` beside it, before it gets its name.
        to: a key of SUFFIXES; None: by the suffix.
        dtype: cast to it; None: as they are.
        config: of the model, which the names of `stability` and `diffusers` need.
        compare: read back what was written and compare every bit.
        replace: take the place of what is there.
        metadata: texts that safetensors have beside the arrays.

    Returns:
        The SHA-256 of the file; of a folder's weight files together.

    Raises:
        ValueError: a value is no array, or of a dtype that cannot be stored; or another was read back.
        FileExistsError: it is there, and is not to be replaced.
    """
    to = to or format_of(path)
    arrays = weights if isinstance(weights, Arrays) else Tensors(weights)
    if path.exists() and not replace:
        raise FileExistsError(f"{path}: exists already; give another name or remove it")
    if to == "diffusers":
        return _write_folder(arrays, path, record, dtype, config, compare)
    named = as_named_in(STABILITY, arrays, config) if to == "stability" else arrays
    with appears_whole(path, replace=replace) as file:
        digest = _write_file(file, named, dtype, to == "mindspore", compare, metadata)
        if record:
            record_digests(path.parent, {path.name: digest})
    return digest


def _write_file(
    file: BinaryIO, arrays: Arrays, dtype: np.dtype | None, is_ckpt: bool, compare: bool,
    metadata: Mapping[str, str] = METADATA,
) -> str:  # fmt: skip
    hashing, arrays = _Hashing(file), Cast(arrays, dtype, compare)
    if is_ckpt:
        write_ckpt(hashing, ((name, arrays[name]) for name in arrays))
    else:
        write_safetensors(hashing, arrays, dict(metadata))
    if compare:
        file.flush()
        written = read_file(Path(file.name))
        for name, checksum in arrays.checksums.items():
            if checksum_of(written[name]) != checksum:
                raise ValueError(
                    f"{name} was not read back as it was written: is the disk or memory damaged?"
                )
    return hashing.digest.hexdigest()


def _write_folder(
    arrays: Arrays, path: Path, record: bool, dtype: np.dtype | None, config: ModelConfig, compare: bool
) -> str:
    digests = {}
    with folder_appears_whole(path) as partial:
        for name, text in folder_files(config).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        for part, named in as_diffusers(arrays, config).items():
            with appears_whole(partial / part / WEIGHT_FILES[part]) as file:
                digest = _write_file(file, named, dtype, is_ckpt=False, compare=compare)
            digests[f"{path.name}/{part}/{WEIGHT_FILES[part]}"] = digest
        if record:
            record_digests(path.parent, digests)
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


class _Hashing:
    """A file that is written to, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content) -> None:
        self.file.write(content)
        self.digest.update(content)
