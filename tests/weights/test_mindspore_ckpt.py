"""The file formats against MindSpore's and safetensors' own readers and writers; damage; memory."""

import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
import torch
from conftest import ROOT, read_checkpoint
from mindspore import nn
from mindspore.train import serialization
from mindspore.train.checkpoint_pb2 import Checkpoint
from safetensors.numpy import load_file, save, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save as save_torch
from safetensors.torch import save_file as save_torch_file

from ldm.weights.arrays import BFLOAT16
from ldm.weights.checkpoint import load_weights
from ldm.weights.mindspore_ckpt import CKPT_DTYPES, CRC, write_ckpt
from ldm.weights.writing import save_weights

MESSAGE = r"^[^\n]*not a readable weight file \([^\n]*{}[^\n]*$"


@pytest.fixture
def arrays():
    """Every dtype, 0 to 4 dimensions; in pieces of 1 KiB two are split."""
    rng = np.random.default_rng(0)
    result = {dtype.name: rng.integers(0, 2, (3, 5)).astype(dtype) for dtype in CKPT_DTYPES.values()}
    large = rng.standard_normal((7, 11, 3, 3)).astype(np.float32)
    return result | {
        "scalar": np.array(-2.5, np.float32),
        "one": np.ones(1, np.float16),
        "größe": large,
        "large.f64": large[..., 0] / 3.0,
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert np.array_equal(found[name], value), name


def entries(arrays):
    return [{"name": name, "data": ms.Tensor(value)} for name, value in arrays.items()]


@pytest.mark.parametrize("split", [False, True])
def test_ckpt_is_what_mindspore_writes_and_reads(tmp_path, arrays, split, monkeypatch):
    if split:
        monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KiB
    ours, theirs = tmp_path / "ours.ckpt", tmp_path / "theirs.ckpt"
    with open(ours, "wb") as file:
        write_ckpt(file, arrays.items(), **({"piece": 1024} if split else {}))
    ms.save_checkpoint(entries(arrays), str(theirs))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.read_bytes().count("größe".encode()) == (3 if split else 1)
    read = {name: parameter.asnumpy() for name, parameter in ms.load_checkpoint(str(ours)).items()}
    bits = read.pop("bfloat16").view(np.uint16)  # MindSpore's dtype of that name is another one
    assert np.array_equal(bits, arrays["bfloat16"].view(np.uint16))
    assert_equal(read, {name: value for name, value in arrays.items() if name != "bfloat16"})
    assert_equal(read_checkpoint(theirs), arrays)


def test_bfloat16_in_safetensors_is_that_of_pytorch(tmp_path):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    save_torch_file({"a": values.bfloat16(), "b": values[0]}, tmp_path / "theirs.safetensors")
    theirs = read_checkpoint(tmp_path / "theirs.safetensors")
    assert theirs["a"].dtype.name == "bfloat16"
    assert np.array_equal(theirs["a"].astype(np.float32), values.bfloat16().float().numpy())
    # rounded by us: to nearest, ties to even, as PyTorch does
    save_weights({"a": values.numpy()}, tmp_path / "ours.safetensors", dtype=BFLOAT16)
    ours = load_torch_file(tmp_path / "ours.safetensors")["a"]
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, values.bfloat16())


def test_safetensors_is_what_the_library_writes_and_reads(tmp_path, arrays):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    del arrays["bfloat16"]  # which its NumPy side has not
    save_weights(arrays, ours)
    save_file(arrays, theirs, {"format": "ms"})
    assert_equal(load_file(ours), arrays)
    assert_equal(read_checkpoint(theirs), arrays)


def test_arrays_that_are_not_contiguous(tmp_path, arrays):
    turned = {"a": arrays["größe"].T, "b": arrays["größe"][::2]}
    for name in ("turned.ckpt", "turned.safetensors"):
        save_weights(turned, tmp_path / name)
        assert_equal(read_checkpoint(tmp_path / name), turned)


def test_checksum(tmp_path, arrays):
    path = tmp_path / "model.ckpt"
    ms.save_checkpoint(entries(arrays), str(path), crc_check=True)
    assert_equal(read_checkpoint(path), arrays)
    damaged = bytearray(path.read_bytes())
    assert damaged[-17:-10] == CRC
    damaged[-18] ^= 1  # a value
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    with pytest.raises(ValueError, match=MESSAGE.format("checksum")):
        read_checkpoint(tmp_path / "damaged.ckpt")


def message(*values) -> bytes:
    """A .ckpt of (tag, dtype, dims, content) by MindSpore's own protobuf classes."""
    checkpoint = Checkpoint()
    for tag, dtype, dims, content in values:
        value = checkpoint.value.add()
        value.tag, value.tensor.tensor_type, value.tensor.tensor_content = tag, dtype, content
        value.tensor.dims.extend(dims)
    return checkpoint.SerializeToString()


def test_a_scalar_of_older_versions(tmp_path):
    (tmp_path / "old.ckpt").write_bytes(message(("a", "Int64", [0], bytes(8)), ("b", "Int64", [0], b"")))
    assert {name: value.shape for name, value in read_checkpoint(tmp_path / "old.ckpt").items()} == {
        "a": (),
        "b": (0,),
    }


GOOD, OTHER = ("a", "Float32", [2, 3], bytes(24)), ("b", "Float32", [1], bytes(4))
MAP = Checkpoint()
MAP.value.add(tag="m").maptensor.tensor.add(dims=[1], tensor_type="Float32", tensor_content=bytes(4))
HOLE = save({"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)})
DAMAGE = {
    "longer": (message(("a", "Float32", [2, 3], bytes(28))),
    r"'a': Float32 of shape \(2, 3\) has 24 bytes, the file has 28"),
    "shorter": (message(("a", "Float32", [2, 3], bytes(20))), "the file has 20"),
    "negative": (message(("a", "Float32", [-1, 0], b"")), "'a': Float32 of shape"),
    "a piece missing": (message(("a", "Float32", [2, 3], bytes(8)), ("a", "Float32", [2, 3], bytes(8)),
    OTHER), "the file has 16"),
    "pieces apart": (message(("a", "Float32", [2, 3], bytes(12)), OTHER, ("a", "Float32", [2, 3], bytes(12))),
    "'a': occurs twice"),
    "pieces differ": (message(("a", "Float32", [6], bytes(12)), ("a", "Float32", [3], bytes(12))),
    "'a': its pieces differ"),
    "twice": (message(GOOD, OTHER, GOOD), "'a': occurs twice"),
    "twice in a row": (message(GOOD, GOOD), "the file has 48"),
    "dtype": (message(("a", "Complex64", [1], bytes(8))), "'a': dtype 'Complex64' is not supported"),
    "map": (MAP.SerializeToString(), "field 3 of type 2 at byte .* is not of a checkpoint"),
    "no tensor": (b"\n\x03\n\x01a", "not one name and one tensor"),
    "cut off": (message(GOOD)[:-1], "bytes should follow"),
    "cut off in a number": (message(GOOD) + b"\n", "cut off at byte"),
    "trailing": (message(GOOD) + b"\0\0", "field 0 of type 0 at byte"),
    "endless number": (b"\n" + b"\xff" * 20, "more than ten bytes"),
    "name": (b"\n\x13\n\x01\xff\x12\x0e\x08\x01\x12\x04Bool\x1a\x04\0\0\0\0", "utf-8"),
    "safetensors cut off": (HOLE[:-1], "not as long as its header says"),
    "safetensors trailing": (HOLE + b"\0", "not as long as its header says"),
    "safetensors overlap": (HOLE.replace(b"[16,32]", b"[15,32]"), "[Ii]nvalid ?[Oo]ffset.*b"),
    "safetensors shape": (HOLE.replace(b"[4]", b"[5]"), "[Ii]nvalid"),
    "safetensors dtype": (HOLE.replace(b"F32", b"F99"), "F99"),
    "safetensors float8": (save_torch({"a": torch.zeros(2).to(torch.float8_e5m2)}), "float8"),
}  # fmt: skip


def test_a_text_beside_the_weights_is_passed_over(tmp_path):
    """ms.save_checkpoint(append_dict=...) adds such."""
    path = str(tmp_path / "a.ckpt")
    ms.save_checkpoint([{"name": "a", "data": ms.Tensor([1.0])}], path, append_dict={"version": "2.0"})
    assert_equal(read_checkpoint(path), {"a": np.ones(1, np.float32)})


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path, case):
    content, reason = DAMAGE[case]
    (tmp_path / "damaged.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=MESSAGE.format(reason)) as error:
        read_checkpoint(tmp_path / "damaged.ckpt")
    print(error.value)


def test_encrypted_files_are_refused(tmp_path, arrays):
    ms.save_checkpoint(entries(arrays), str(tmp_path / "secret.ckpt"), enc_key=b"0123456789abcdef")
    with pytest.raises(ValueError, match=MESSAGE.format("encrypted")):
        read_checkpoint(tmp_path / "secret.ckpt")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path, arrays):
    path = tmp_path / "model.ckpt"
    save_weights(arrays, path)
    weights = read_checkpoint(path)
    with open(path, "r+b") as file:
        file.truncate(50)
    with pytest.raises(ValueError, match="cut off within 'large.f64'"):
        weights["large.f64"]


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(np.ones((2, 3), np.float32), name="weight")
        self.bias = ms.Parameter(np.ones(3, np.float32), name="bias")
        self.scale = ms.Parameter(ms.Tensor(1.0, ms.float32), name="scale")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_any_change_of_the_bytes_loads_the_same_names_or_is_refused(tmp_path, suffix):
    net, rng, outcomes = Net(), np.random.default_rng(7), []
    path = tmp_path / f"model{suffix}"
    save_weights({parameter.name: parameter for parameter in net.get_parameters()}, path)
    original = path.read_bytes()
    for _ in range(300):
        changed = bytearray(original)
        for at in rng.integers(0, len(original), rng.integers(1, 3)):
            kind = rng.integers(4)
            byte = bytes([rng.integers(256)]) if kind < 3 else b""
            changed[at : at + (kind != 2)] = byte  # replaced, inserted (2) or removed (3)
        if rng.integers(5) == 0:
            del changed[rng.integers(len(changed)) :]
        path.write_bytes(changed)
        try:
            # names and shapes are this net's, or ValueError
            load_weights(net, read_checkpoint(path), "changed")
            outcomes.append("loaded")
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes.append("refused")
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})
    assert set(outcomes) == {"loaded", "refused"}


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from mindspore import nn
from mindspore.nn.utils import no_init_parameters
from ldm.weights.checkpoint import load_weights, weights_of
from ldm.weights.source import read_file
from ldm.weights.writing import save_weights

def megabytes(key):
    # ru_maxrss would start at the parent's peak
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

with no_init_parameters():
    net = nn.SequentialCell(*[nn.Dense(1024, 2560, has_bias=False) for _ in range(20)])
before = megabytes("VmRSS")
load_weights(net, read_file(Path(sys.argv[2])), "large")
loaded = megabytes("VmHWM") - before
save_weights(weights_of(net), Path(sys.argv[3]))
print(loaded, megabytes("VmHWM") - before)
"""


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_no_second_copy_in_memory(tmp_path, suffix):
    values, size = np.full((2560, 1024), 0.5, np.float32), 200
    source, target = tmp_path / f"large{suffix}", tmp_path / f"again{suffix}"
    save_weights({f"{number}.weight": values for number in range(20)}, source)
    assert source.stat().st_size // 2**20 == size
    command = [sys.executable, "-c", MEMORY, str(ROOT), str(source), str(target)]
    loaded, saved = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    )
    print(f"{suffix}: {size} MB loaded with {loaded:.0f} MB, saved with {saved:.0f} MB")
    assert size < loaded < 1.3 * size and saved < 1.3 * size  # one array is 10 MB
    assert_equal(read_checkpoint(target), read_checkpoint(source))
