"""PyTorch's weight files (.bin, .pt), for conversion only: tensors are built, and nothing that a file names
is imported or called.

Such a file is a ZIP archive: `NAME/data.pkl`, a pickle of the state dictionary, in which storages are
references; and `NAME/data/KEY`, their bytes, not compressed. The pickle is run with an allow-list of five
names, by Python's own implementation, which unlike the one in C allocates nothing for what the pickle only
announces.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

STORAGES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip
LARGEST_PICKLE = 64 * 2**20  # bytes; the one of Stable Diffusion 2's UNet has 0.1 MB


OPERATIONS = (  # of a pickle, as far as state dictionaries use them
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS BINPUT LONG_BINPUT BINGET "
    "LONG_BINGET GLOBAL REDUCE BINPERSID"
).split()


@dataclass(frozen=True)
class _Storage:
    """The values of one or more tensors, one after the other."""

    values: np.ndarray


class _Unpickler(pickle._Unpickler):
    """Knows tensors, ordered dictionaries and parameters; every other name or operation ends it."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(BytesIO(_member(archive, f"{root}/data.pkl", LARGEST_PICKLE)))
        self.archive, self.root, self.storages = archive, root, {}
        self.left = Path(archive.filename).stat().st_size  # bytes; more are members that lie over each other

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise ValueError(
            f"the pickle asks for {module}.{name}, which is no part of a tensor: refused, and not run"
        )

    def persistent_load(self, reference) -> _Storage:
        kind, dtype, key, _, count = reference
        if (
            kind != "storage"
            or not isinstance(dtype, np.dtype)
            or not isinstance(key, str)
            or not isinstance(count, int)
        ):
            raise ValueError("a reference of the pickle is not a storage of numbers")
        if key not in self.storages:
            size = count * dtype.itemsize
            content = _member(self.archive, f"{self.root}/data/{key}", min(size, self.left))
            if len(content) != size:
                raise ValueError(f"storage {key}: must have {size} bytes, got {len(content)}")
            self.left -= size
            self.storages[key] = _Storage(np.frombuffer(content, dtype))
        return self.storages[key]

    def load_build(self) -> None:
        """A dictionary's attributes (the versions of modules): not needed."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise ValueError("the pickle sets attributes of something else than a dictionary")

    dispatch = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPERATIONS)
    }
    dispatch[pickle.BUILD[0]] = load_build


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A file of the archive, not compressed and not larger than `limit` bytes; its checksum is compared."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed, which PyTorch never does")
    if info.file_size > limit:
        raise ValueError(f"{name}: {info.file_size} bytes, {limit} expected")
    return archive.read(info)


def _tensor(storage, offset, shape, stride, *_) -> np.ndarray:
    """torch._utils._rebuild_tensor_v2 for what a state dictionary holds: a part of a storage, every value
    once.
    """
    if not isinstance(
        storage, _Storage
    ):  # a tensor, too, would be an array, but its values need not lie one after the other
        raise ValueError("a tensor without a storage")
    storage = storage.values
    numbers = [offset, *shape, *stride]
    if len(shape) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    reach = (
        offset + sum((side - 1) * step for side, step in zip(shape, stride)) + 1 if 0 not in shape else offset
    )
    if reach > storage.size or math.prod(shape) > storage.size:
        raise ValueError(
            f"a tensor of shape {shape} and stride {stride} does not fit its storage of {storage.size} values"
        )
    if 0 in shape:
        return np.empty(tuple(shape), storage.dtype)
    return np.lib.stride_tricks.as_strided(
        storage[offset:], tuple(shape), [step * storage.itemsize for step in stride], writeable=False
    )


def _parameter(tensor, *_) -> np.ndarray:
    return tensor


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Name to array of a PyTorch state dictionary, also of one under the key `state_dict`.

    Raises:
        ValueError: not such a file, damaged, or with anything but tensors in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [
                name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")
            ]
            if len(roots) != 1:
                raise ValueError("no data.pkl in it, or several")
            content = _Unpickler(archive, roots[0]).load()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: not a PyTorch ZIP archive ({error}); files from before PyTorch 1.6 are not read"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its next operation finds
        raise ValueError(
            f"{path}: not a readable PyTorch file ({str(error) or type(error).__name__})"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in content.items())
    ):
        raise ValueError(f"{path}: not a dictionary of names and tensors")
    return dict(content)
