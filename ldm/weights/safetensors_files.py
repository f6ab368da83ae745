"""safetensors files: a header length of 8 bytes, a JSON object of names, dtypes, shapes and offsets, then the
arrays.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ldm.weights.arrays import ArraysInFile, make_entry

DTYPES = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "BOOL": np.bool_,
}  # fmt: skip
NUMPY_DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}


def is_safetensors(path: Path) -> bool:
    """Whether the content (not the name) is safetensors."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> ArraysInFile:
    """Name to array; an array is read when it is asked for.

    Raises:
        ValueError: the file is damaged, or has an array of a dtype that NumPy has not.
    """
    try:
        with safe_open(
            path, "numpy"
        ):  # checks that the arrays fit their shapes and fill the file without gap or overlap
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    file = open(path, "rb")
    start = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        first, last = info["data_offsets"]
        entries[name] = make_entry(
            name, NUMPY_DTYPES, info["dtype"], tuple(info["shape"]), [(start + first, last - first)]
        )
    return ArraysInFile(file, entries)


def write_safetensors(
    weights: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write arrays to a file. `path` may be one that is open already."""
    save_file({name: np.asarray(value, order="C") for name, value in weights.items()}, path, metadata)
