"""PyTorch's weight files: equal to what torch reads; and none of them runs anything or takes more memory than
it is large.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from ldm.weights.torch_pickle import read_torch_file


def test_equal_to_torch(tmp_path):
    shared = torch.randn(4, 6)
    state = torch.nn.Linear(3, 2).state_dict() | {
        "half": torch.randn(2, 3).half(), "whole": torch.arange(5), "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "transposed": shared.T, "part": shared[1:3, 2:], "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    for number, content in enumerate((state, OrderedDict(state), {"state_dict": state, "step": 3})):
        path = tmp_path / f"{number}.bin"
        torch.save(content, path)
        found = read_torch_file(path)
        assert found.keys() == state.keys()
        for name, value in state.items():
            value = value.detach().numpy()
            assert found[name].dtype == value.dtype and np.array_equal(found[name], value), name


class Command:
    """A pickle that runs a command when it is loaded by an unpickler without an allow-list."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def archive(path, content: bytes, compression=zipfile.ZIP_STORED, **members: bytes):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        for key, value in members.items():
            file.writestr(f"archive/data/{key}", value)
    return path


def pickled(value) -> bytes:
    return pickle.dumps(value, protocol=2)


class Reference:
    """A storage as torch.save refers to it."""

    def __init__(self, key, count):
        self.id = ("storage", torch.FloatStorage, key, "cpu", count)


def with_tensors(*tensors) -> bytes:
    """The pickle of {"0": tensor, ...} from (key, count, offset, shape, stride)."""

    class Tensor:
        def __init__(self, key, count, *rest):
            self.arguments = (Reference(key, count), *rest)

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (*self.arguments, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.id if isinstance(value, Reference) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({str(number): Tensor(*tensor) for number, tensor in enumerate(tensors)})
    return buffer.getvalue()


def test_a_command_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "was run"
    content = pickled({"weights": Command(f"touch '{mark}'")})
    pickle.loads(content)
    assert mark.exists()  # the attack works
    mark.unlink()
    with pytest.raises(
        ValueError, match=r"asks for posix.system, which is no part of a tensor: refused, and not run"
    ):
        read_torch_file(archive(tmp_path / "a.bin", content))
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "numpy.load",
        "torch.load",
        "collections.namedtuple",
        "torch._utils.os",
    ],
)
def test_other_names_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ValueError, match="refused, and not run"):
        read_torch_file(archive(tmp_path / "a.bin", b"\x80\x02c" + f"{module}\n{attribute}\n.".encode()))


CASES = {
    "as it should be": (("0", 6, 0, (2, 3), (3, 1)), None),
    "a storage that is not there": (("1", 6, 0, (2, 3), (3, 1)), "no item named"),
    "more values than the storage has": (("0", 6, 0, (3, 3), (3, 1)), "does not fit its storage"),
    "a start behind the storage": (("0", 6, 4, (3,), (1,)), "does not fit its storage"),
    "steps beyond the storage": (("0", 6, 0, (2, 2), (6, 1)), "does not fit its storage"),
    "one value a million times": (("0", 6, 0, (1000, 1000), (0, 0)), "does not fit its storage"),
    "one value seven times": (("0", 6, 0, (6, 6), (0, 0)), "does not fit its storage"),
    "a negative step": (("0", 6, 5, (6,), (-1,)), "of shape"),
    "a size that overflows": (("0", 2**62, 0, (2**62,), (1,)), "must have"),
    "a storage larger than announced": (("0", 5, 0, (5,), (1,)), "24 bytes, 20 expected"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_tensor_says_is_checked(tmp_path, case):
    tensor, message = CASES[case]
    values = np.arange(6, dtype=np.float32)
    path = archive(tmp_path / "a.bin", with_tensors(tensor), **{"0": values.tobytes()})
    if message is None:
        assert np.array_equal(read_torch_file(path)["0"], values.reshape(2, 3))
    else:
        with pytest.raises(ValueError, match=f"a.bin: not a readable PyTorch file .*{message}"):
            read_torch_file(path)


def test_a_tensor_is_no_storage(tmp_path):
    """Of a tensor that holds one value six times, the values do not lie one after the other: reading on would
    leave the file.
    """
    inner = with_tensors(("0", 6, 5, (6,), (0,)))
    start, end = inner.index(b"ctorch._utils"), inner.index(b"R", inner.index(b"OrderedDict"))
    tensor = inner[start : inner.index(b"R", end + 1) + 1]
    reference = inner[inner.index(b"(", start) + 1 : inner.index(b"Q") + 1]
    nested = inner.replace(reference, tensor, 1)
    values = np.arange(6, dtype=np.float32).tobytes()
    read_torch_file(archive(tmp_path / "sound.bin", inner, **{"0": values}))
    with pytest.raises(ValueError, match="a tensor without a storage"):
        read_torch_file(archive(tmp_path / "a.bin", nested, **{"0": values}))


def test_bombs(tmp_path):
    with pytest.raises(ValueError, match="is compressed"):
        zeros = bytes(2**24)
        read_torch_file(
            archive(
                tmp_path / "a.bin",
                with_tensors(("0", 2**22, 0, (2**22,), (1,))),
                zipfile.ZIP_DEFLATED,
                **{"0": zeros},
            )
        )
    for content in (
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    ):
        with pytest.raises(
            ValueError, match="not a"
        ):  # an announced memo index, string and bytes of gigabytes
            read_torch_file(archive(tmp_path / "b.bin", content))
    deep = b"\x80\x02" + b"(" * 10**6 + b"."
    with pytest.raises(ValueError, match="not a"):
        read_torch_file(archive(tmp_path / "c.bin", deep))
    path = archive(
        tmp_path / "d.bin",
        with_tensors(("0", 256, 0, (256,), (1,)), ("1", 256, 0, (256,), (1,))),
        **{"0": bytes(1024)},
    )
    data = path.read_bytes()
    # the directory's entry of storage 0, once more as storage 1
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    end = data.index(b"PK\x05\x06")
    twice = bytearray(data[entry:end])
    twice[46 + len("archive/data/")] = ord("1")
    tail = bytearray(data[end:])
    tail[8:12] = (3).to_bytes(2, "little") * 2
    tail[12:16] = (int.from_bytes(tail[12:16], "little") + len(twice)).to_bytes(4, "little")
    path.write_bytes(data[:end] + twice + tail)
    with pytest.raises(ValueError, match="not a readable PyTorch file"):
        read_torch_file(path)


def nested(levels: int) -> bytes:
    """A tuple of two of the one before, and so on: a few bytes each, twice as long to print or to hash."""
    start = b"K\x01K\x01\x86"
    return start + b"".join(
        b"q" + bytes([100 + n]) + b"h" + bytes([100 + n]) + b"\x86" for n in range(levels)
    )


def test_tuples_that_unfold(tmp_path):
    """As the shape of a tensor, and as a key: 2^60 numbers from 300 bytes."""
    sound = with_tensors(("0", 6, 0, (2, 3), (3, 1)))
    shape = sound.index(b"K\x02K\x03\x86")
    with_shape = sound[:shape] + nested(60) + sound[shape + 5 :]
    with_key = b"\x80\x02}" + nested(60) + b"K\x01s."
    copied = b"\x80\x02ccollections\nOrderedDict\n}\x85R."
    for content, wanted in (
        (with_shape, "a tensor of a shape that is none"),
        (with_key, "neither a name nor a number"),
        (copied, "copies a dictionary"),
    ):
        with pytest.raises(ValueError, match=wanted) as error:
            read_torch_file(archive(tmp_path / "a.bin", content, **{"0": bytes(24)}))
        assert len(str(error.value)) < 300


def test_other_protocols_and_words(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(ValueError, match="an unusual operation.: save it again"):
        read_torch_file(tmp_path / "a.pt")
    torch.save({"string_to_param": {"*": torch.ones(1, 768)}, "name": "cat"}, tmp_path / "cat.pt")
    with pytest.raises(ValueError, match="this is a textual inversion"):
        read_torch_file(tmp_path / "cat.pt")


def test_what_is_no_such_file(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"", b"hello", pickled({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a PyTorch ZIP archive"):
            read_torch_file(path)
    for content in (pickled([1, 2]), pickled({"a": 1}), pickled({1: 2})):
        with pytest.raises(ValueError, match="not a"):
            read_torch_file(archive(path, content))
    torch.save({"a": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(np.ones(4, np.float32).tobytes())] ^= 1  # the archive's own checksum finds it
    path.write_bytes(data)
    with pytest.raises(ValueError, match="Bad CRC"):
        read_torch_file(path)
