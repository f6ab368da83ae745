"""safetensors files: a header length of 8 bytes, a JSON object of names, dtypes, shapes and offsets, then the
arrays.
"""

import json
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from ldm.weights.arrays import BFLOAT16, Arrays, ArraysInFile, make_entry

DTYPES = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
    "BF16": BFLOAT16, "I64": np.int64,
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
    metadata = header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        if info["dtype"].startswith(("F8_", "F6_", "F4")):
            raise ValueError(
                f"{name!r}: numbers of the kind {info['dtype']} (float8) are not read: get it as float16"
            )
        first, last = info["data_offsets"]
        entries[name] = make_entry(
            name, NUMPY_DTYPES, info["dtype"], tuple(info["shape"]), [(start + first, last - first)]
        )
    result = ArraysInFile(file, entries)
    result.metadata = metadata or {}
    return result


def write_safetensors(file: BinaryIO, weights: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Write arrays one after the other.

    Raises ValueError for a dtype that cannot be stored.
    """
    names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
    header: dict = {"__metadata__": metadata} if metadata else {}
    start = 0
    # the large kinds first, as the library has them: every array lies at a multiple of its kind's size
    order = sorted(weights, key=lambda name: -weights.dtype(name).itemsize)
    for name in order:
        kind = weights.dtype(name)
        if kind not in names:
            raise ValueError(f"{name!r}: an array of dtype {kind} cannot be stored")
        end = start + math.prod(weights.shape(name)) * kind.itemsize
        header[name] = {
            "dtype": names[kind],
            "shape": list(weights.shape(name)),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(np.ascontiguousarray(weights[name]).reshape(-1).view(np.uint8))
