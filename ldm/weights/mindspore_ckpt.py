"""MindSpore's .ckpt files: what lies where, and writing them as ms.load_checkpoint reads them.

Without MindSpore.

Never holds more than one array of a file. A .ckpt is a protobuf message (MindSpore's checkpoint.proto):
    Checkpoint { repeated Value value = 1; }      Value { string tag = 1; TensorProto tensor = 2; }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3; }
A large array is several consecutive values of one tag, each with the dims of the whole. `crc_num` and ten
bytes may follow.
"""

import mmap
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm.weights.arrays import BFLOAT16, ArraysInFile, Entry, make_entry

CKPT_DTYPES = {  # MindSpore's name, in lower case NumPy's
    name: np.dtype(name.lower())
    for name in "Float32 Float16 Float64 Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Bool".split()
} | {"BFloat16": BFLOAT16}
TEXT = "str"  # what ms.save_checkpoint(append_dict=...) makes of a text: never a weight
VARINT, BYTES = 0, 2  # protobuf's wire types
ENCRYPTED = bytes.fromhex("d85e3a7f")  # the first bytes of what ms.save_checkpoint(enc_key=...) writes
CRC = b"crc_num"
PIECE = 512 * 2**20  # bytes of an array in one value of a .ckpt, as MindSpore cuts it


def read_ckpt(path: Path) -> ArraysInFile:
    """Name to array; an array is read when it is asked for.

    Raises:
        ValueError: the file is no .ckpt, is encrypted or damaged, or has an array of a dtype that NumPy has
            not.
    """
    file = open(path, "rb")
    return ArraysInFile(file, _ckpt_entries(file))


def _ckpt_entries(file: BinaryIO) -> dict[str, Entry]:
    with mmap.mmap(
        file.fileno(), 0, access=mmap.ACCESS_READ
    ) as data:  # only the pages between the arrays' contents are touched
        if data[:4] == ENCRYPTED:
            raise ValueError("it is encrypted, which is not supported")
        end = len(data)
        if end > 17 and data[end - 17 : end - 10] == CRC:
            end -= 17
            _check_crc(file, end, int.from_bytes(data[end + 7 :], "big"))
        found, last = {}, None
        for value in _message(data, (0, end), {1: BYTES})[1]:
            name, description, piece = _ckpt_value(data, value)
            if name != last and name in found:
                raise ValueError(f"{name!r}: occurs twice")
            if found.setdefault(name, (description, []))[0] != description:
                raise ValueError(f"{name!r}: its pieces differ in dtype or shape")
            found[name][1].append(piece)
            last = name
    return {
        name: make_entry(name, CKPT_DTYPES, *description, pieces)
        for name, (description, pieces) in found.items()
        if description[0] != TEXT
    }


def _ckpt_value(
    data: mmap.mmap, span: tuple[int, int]
) -> tuple[str, tuple[str, tuple[int, ...]], tuple[int, int]]:
    """Name, (dtype, shape) and (offset, size) of the content."""
    value = _message(data, span, {1: BYTES, 2: BYTES})
    if not len(value[1]) == len(value[2]) == 1:
        raise ValueError(f"the value at byte {span[0]} is not one name and one tensor")
    name = _text(data, value[1][0])
    tensor = _message(data, value[2][0], {1: VARINT, 2: BYTES, 3: BYTES})
    if not len(tensor[2]) == len(tensor[3]) == 1:
        raise ValueError(f"{name!r}: not one dtype and one content")
    start, end = tensor[3][0]
    # older versions of MindSpore write a scalar's dims as [0]
    shape = () if tensor[1] == [0] and end > start else tuple(tensor[1])
    return name, (_text(data, tensor[2][0]), shape), (start, end - start)


def _message(data: mmap.mmap, span: tuple[int, int], kinds: Mapping[int, int]) -> dict[int, list]:
    """The fields of a protobuf message by number: ints, and for bytes their (start, end).

    `kinds` are the wire types there may be.
    """
    fields: dict[int, list] = {number: [] for number in kinds}
    at, end = span
    while at < end:
        key, after = _varint(data, at, end)
        number, kind = divmod(key, 8)
        if kinds.get(number) != kind:
            raise ValueError(f"field {number} of type {kind} at byte {at} is not of a checkpoint")
        value, at = _varint(data, after, end)
        if kind == BYTES:
            if value > end - at:
                raise ValueError(f"{value} bytes should follow byte {at}, {end - at} are there")
            value, at = (at, at + value), at + value
        fields[number].append(value)
    return fields


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and the position after it."""
    value = 0
    for count in range(10):
        if at + count >= end:
            raise ValueError(f"cut off at byte {end}")
        value |= (data[at + count] & 127) << (7 * count)
        if data[at + count] < 128:
            return value, at + count + 1
    raise ValueError(f"a number of more than ten bytes at byte {at}")


def _text(data: mmap.mmap, span: tuple[int, int]) -> str:
    return data[span[0] : span[1]].decode()


def _check_crc(file: BinaryIO, size: int, written: int) -> None:
    file.seek(0)
    crc = 0
    for start in range(0, size, 2**20):
        crc = zlib.crc32(file.read(min(2**20, size - start)), crc)
    if crc != written:
        raise ValueError(f"its checksum is {crc:08x}, {written:08x} was written")


def write_ckpt(file: BinaryIO, weights: Iterable[tuple[str, np.ndarray]], piece: int = PIECE) -> None:
    """Write arrays one after the other as ms.load_checkpoint reads them.

    Raises ValueError for a dtype that cannot be stored.
    """
    names = {dtype: name for name, dtype in CKPT_DTYPES.items()}
    for name, array in weights:
        if array.dtype not in names:
            raise ValueError(f"{name!r}: an array of dtype {array.dtype} cannot be stored")
        dims = b"".join(bytes([1 << 3 | VARINT]) + _as_varint(dim) for dim in array.shape)
        # a copy only where it is not contiguous
        content = np.asarray(array, order="C").reshape(-1).view(np.uint8)
        for start in range(0, max(1, content.size), piece):
            part = content[start : start + piece]
            tensor = dims + _head(2, names[array.dtype].encode()) + _head(3, b"", part.size)
            value = _head(1, name.encode()) + _head(2, tensor, part.size)
            file.write(_head(1, value, part.size))
            file.write(part)


def _head(number: int, content: bytes, more: int = 0) -> bytes:
    """A bytes field of a protobuf message as far as `content`; `more` bytes of it are still to be written."""
    return bytes([number << 3 | BYTES]) + _as_varint(len(content) + more) + content


def _as_varint(value: int) -> bytes:
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes(groups) + bytes([value])
