"""PyTorch's weight files (.ckpt, .pt, .bin): where each tensor lies. Nothing that a file names is imported or
called.

Such a file is a ZIP archive: `NAME/data.pkl`, a pickle of the state dictionary, in which storages are
references; and `NAME/data/KEY`, their bytes, not compressed. Before PyTorch 1.6 it was five pickles (a magic
number, a version, the machine, the dictionary, the storages' keys), then the storages. A pickle is run with
an allow-list, by Python's own implementation, which unlike the one in C allocates nothing for what the pickle
only announces. What PyTorch Lightning puts beside `state_dict` is passed over as inert objects.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm.weights.arrays import BFLOAT16, ArraysInFile, Entry

STORAGES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "DoubleStorage": np.float64,
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip
LARGEST_PICKLE = 64 * 2**20  # bytes; the one of Stable Diffusion 2's UNet has 0.1 MB
LARGEST_RANK = 8  # axes of a tensor
LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # PyTorch's magic number, pickled
# What stands beside `state_dict` in published files and in those of PyTorch Lightning.
INERT = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.parsing.AttributeDict", "argparse.Namespace",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray", "_codecs.encode",
    "__builtin__.set", "builtins.set", "__builtin__.dict", "builtins.dict", "__builtin__.list",
    "builtins.list", "collections.defaultdict", "collections.Counter", "torch.Size", "typing.Any",
    "torch.device", "torch.float32", "torch.float16", "pathlib.PosixPath", "pathlib.WindowsPath",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
    "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode", "omegaconf.nodes.FloatNode", "omegaconf.nodes.BooleanNode",
    "torch.bfloat16", "torch.nn.modules.container.ParameterDict",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
}  # fmt: skip
NEWER_NUMBERS = {"torch._utils._rebuild_tensor_v3", "torch.storage.UntypedStorage"}

OPERATIONS = (  # of a pickle, as far as state dictionaries use them
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS BINPUT LONG_BINPUT BINGET "
    "LONG_BINGET GLOBAL BINPERSID"
).split()


class TorchFile(ArraysInFile):
    """A state dictionary.

    Attributes:
        global_step: how long the model was trained, where the file says it.
    """

    global_step: int | None = None


@dataclass
class _Storage:
    """The values of one or more tensors, one after the other; `start` is where in the file, in bytes."""

    dtype: np.dtype
    count: int
    start: int = -1


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def entry(self) -> Entry:
        size, last = self.storage.dtype.itemsize, self.reach()
        begin = self.storage.start + self.offset * size
        in_order, step = [], 1
        for side in reversed(self.shape):
            in_order.insert(0, step)
            step *= side
        # an axis of one value may have any stride
        is_in_order = all(side == 1 or a == b for side, a, b in zip(self.shape, self.stride, in_order))
        stride = None if is_in_order or 0 in self.shape else self.stride
        return Entry(self.storage.dtype, self.shape, [(begin, (last - self.offset) * size)], stride)

    def reach(self) -> int:
        """Behind the last value, in the storage."""
        if 0 in self.shape:
            return self.offset
        return self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.stride)) + 1


class _Inert:
    """Stands for something that is not needed. Whatever is done with it does nothing."""

    def __setitem__(self, key, value) -> None:
        pass

    def append(self, value) -> None:
        pass

    def extend(self, values) -> None:
        pass


class _Unpickler(pickle._Unpickler):
    """Knows tensors, ordered dictionaries and parameters, and what is inert; every other name or operation
    ends it.
    """

    def __init__(self, stream: BytesIO, size: int) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}
        self.left = size  # bytes; more are storages that lie over each other

    def find_class(self, module: str, name: str):
        full = f"{module}.{name}"
        known = {"collections.OrderedDict": OrderedDict, "torch._utils._rebuild_tensor_v2": _tensor,
                 "torch._utils._rebuild_parameter": _parameter}  # fmt: skip
        if full in known:
            return known[full]
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if full in INERT:
            return _Inert()
        if full in NEWER_NUMBERS:
            raise ValueError("it has numbers of a kind that is not read, such as float8")
        raise ValueError(f"the pickle asks for {full}, which is no part of a tensor: refused, and not run")

    def persistent_load(self, reference) -> _Storage:
        kind, dtype, key, _, count, *view = reference
        if (
            kind != "storage"
            or not isinstance(dtype, np.dtype)
            or not isinstance(key, str)
            or not isinstance(count, int)
            or count < 0
            or view not in ([], [None])
        ):
            raise ValueError("a reference of the pickle is not a storage of numbers")
        if key not in self.storages:
            size = count * dtype.itemsize
            if size > self.left:
                raise ValueError(f"storage {key}: must have {size} bytes, the file has {self.left} left")
            self.left -= size
            self.storages[key] = _Storage(dtype, count)
        if self.storages[key].dtype != dtype or self.storages[key].count != count:
            raise ValueError(f"storage {key}: is described in two ways")
        return self.storages[key]

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is OrderedDict and arguments:  # PyTorch makes empty ones, and fills them
            raise ValueError("the pickle copies a dictionary")
        if function in (OrderedDict, _tensor, _parameter):
            self.append(function(*arguments))
        elif isinstance(function, _Inert):
            self.append(_Inert())
        else:
            raise ValueError("the pickle calls what is no function: refused, and not run")

    def load_setitem(self) -> None:
        self._check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            self._check_key(key)
        super().load_setitems()

    def _check_key(self, key) -> None:
        """Tuples within tuples take for ever to hash."""
        if not isinstance(key, (str, int, _Inert)):
            raise ValueError("a key of a dictionary is neither a name nor a number")

    def load_build(self) -> None:
        """An object's attributes (of a dictionary the versions of modules): not needed."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (OrderedDict, _Inert)):
            raise ValueError("the pickle sets attributes of something else than a dictionary")

    dispatch = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPERATIONS)
    }
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems
    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = load_reduce


def _tensor(storage, offset, shape, stride, *_) -> _Tensor:
    """torch._utils._rebuild_tensor_v2 for what a state dictionary holds: a part of a storage, every value
    once.
    """
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    if not all(isinstance(sides, tuple) and len(sides) <= LARGEST_RANK for sides in (shape, stride)):
        raise ValueError("a tensor of a shape that is none")
    numbers = [offset, *shape, *stride]
    if not all(isinstance(number, int) and abs(number) < 2**63 for number in numbers):
        raise ValueError("a tensor of a shape that is none")
    if len(shape) != len(stride) or min(numbers) < 0:
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    tensor = _Tensor(storage, offset, tuple(shape), tuple(stride))
    if tensor.reach() > storage.count or math.prod(shape) > storage.count:
        raise ValueError(
            f"a tensor of shape {shape} and stride {stride} does not fit its storage of {storage.count} "
            f"values"
        )
    return tensor


def _parameter(tensor, *_) -> _Tensor:
    return tensor


def is_torch_file(head: bytes) -> bool:
    """Whether a file that begins with `head` is one of PyTorch, of either kind."""
    return head.startswith((b"PK\x03\x04", LEGACY))


def read_torch_file(path: Path) -> TorchFile:
    """Name to array of a PyTorch state dictionary, also of one under the key `state_dict`.

    Raises:
        ValueError: not such a file, damaged, or with anything but tensors in it.
    """
    file = open(path, "rb")
    try:
        is_legacy = file.read(len(LEGACY)) == LEGACY
        content = _legacy_content(file) if is_legacy else _archive_content(path, file)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a PyTorch ZIP archive, or damaged ({error})") from None
    except KeyError as error:
        what = error.args[0] if error.args and isinstance(error.args[0], str) else "an unusual operation"
        raise ValueError(
            f"{path}: not a readable PyTorch file ({what}): save it again with torch.save's own protocol, or "
            f"get the model as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its next operation finds
        raise ValueError(
            f"{path}: not a readable PyTorch file ({str(error) or type(error).__name__})"
        ) from None
    if isinstance(content, Mapping) and "string_to_param" in content:
        raise ValueError(f"{path}: this is a textual inversion, a word for a model and no model")
    step = content.get("global_step") if isinstance(content, Mapping) else None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in content.items())
    ):
        raise ValueError(f"{path}: not a dictionary of names and tensors")
    result = TorchFile(file, {name: tensor.entry() for name, tensor in content.items()})
    result.global_step = step if isinstance(step, int) else None
    return result


def _archive_content(path: Path, file: BinaryIO):
    with zipfile.ZipFile(path) as archive:
        roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("no data.pkl in it, or several")
        _check_member(archive, f"{roots[0]}/data.pkl", LARGEST_PICKLE)
        unpickler = _Unpickler(BytesIO(archive.read(f"{roots[0]}/data.pkl")), path.stat().st_size)
        content = unpickler.load()
        for key, storage in unpickler.storages.items():
            size = storage.count * storage.dtype.itemsize
            info = _check_member(archive, f"{roots[0]}/data/{key}", size)
            if info.file_size != size:
                raise ValueError(f"storage {key}: must have {size} bytes, got {info.file_size}")
            with archive.open(info) as member:  # compares its checksum
                while member.read(2**20):
                    pass
            file.seek(info.header_offset + 26)  # the local header: 30 bytes, name, extra field
            sizes = file.read(4)
            name, extra = (int.from_bytes(sizes[at : at + 2], "little") for at in (0, 2))
            storage.start = info.header_offset + 30 + name + extra
    return content


def _check_member(archive: zipfile.ZipFile, name: str, limit: int) -> zipfile.ZipInfo:
    """A file of the archive, not compressed and not larger than `limit` bytes."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed, which PyTorch never does")
    if info.file_size > limit:
        raise ValueError(f"{name}: {info.file_size} bytes, {limit} expected")
    return info


def _legacy_content(file: BinaryIO):
    size = file.seek(0, 2)
    file.seek(0)
    stream = BytesIO(file.read(LARGEST_PICKLE))
    for _ in range(3):  # the magic number, the version, the machine
        _Unpickler(stream, 0).load()
    unpickler = _Unpickler(stream, size)
    content, keys = unpickler.load(), _Unpickler(stream, 0).load()
    if sorted(keys) != sorted(unpickler.storages):
        raise ValueError("its storages are not those that its tensors name")
    start = stream.tell()
    for key in keys:
        storage = unpickler.storages[key]
        file.seek(start)
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise ValueError(f"storage {key}: not of {storage.count} values, or cut off")
        storage.start = start + 8
        start = storage.start + storage.count * storage.dtype.itemsize
    if start > size:
        raise ValueError(f"cut off: {size} bytes, {start} expected")
    return content
