import hashlib

import mindspore as ms
import numpy as np
import pytest
from conftest import SHALLOW, in_half, random_model, read_checkpoint, weights_as_arrays
from safetensors.numpy import save_file

from ldm.networks.latent_diffusion import build_model
from ldm.weights.checkpoint import blank_values, load_weights, weights_of
from ldm.weights.writing import save_weights


@pytest.fixture(scope="module")
def model():
    return random_model(SHALLOW)


@pytest.fixture
def weights(model):
    return weights_as_arrays(model)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_what_is_saved_is_loaded(tmp_path, model, weights, suffix):
    path = tmp_path / f"model{suffix}"
    save_weights(weights_of(model), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    fresh = build_model(SHALLOW)
    load_weights(fresh, read_checkpoint(path), path.name)
    assert all(np.array_equal(value, weights[name]) for name, value in weights_as_arrays(fresh).items())


def test_a_checkpoint_loads_with_mindspores_own_function(tmp_path, model, weights):
    save_weights(weights_of(model), tmp_path / "model.ckpt")
    fresh = build_model(SHALLOW, initialise=True)
    missing, extra = ms.load_param_into_net(
        fresh, ms.load_checkpoint(str(tmp_path / "model.ckpt")), strict_load=True
    )
    assert not missing and not extra
    assert all(np.array_equal(value, weights[name]) for name, value in weights_as_arrays(fresh).items())


def test_the_content_decides_about_the_format_not_the_name(tmp_path, weights):
    save_file(weights, tmp_path / "model.ckpt")
    assert read_checkpoint(tmp_path / "model.ckpt").keys() == weights.keys()


def test_half_precision_files_fill_float32_parameters(weights):
    fresh = build_model(SHALLOW)
    load_weights(fresh, {name: value.astype(np.float16) for name, value in weights.items()}, "half")
    assert {parameter.dtype for parameter in fresh.get_parameters()} == {ms.float32}


def test_loading_is_strict_and_all_or_nothing(model, weights):
    first, second, third = list(weights)[:3]
    bad = dict(weights, extra=np.zeros(3, np.float32))
    del bad[first]
    bad[second] = np.zeros((1, 2), np.float32)
    bad[third] = np.full_like(weights[third], np.nan)
    before = weights_as_arrays(model)
    with pytest.raises(ValueError) as error:
        load_weights(model, bad, "bad.ckpt")
    for part in (
        f"missing: 1 ({first})",
        "not of this model: 1 (extra)",
        f"of another shape: 1 ({second} (1, 2)",
        f"with NaN or Inf: 1 ({third})",
    ):
        assert part in str(error.value)
    assert all(np.array_equal(value, before[name]) for name, value in weights_as_arrays(model).items())


def test_only_finite_floats_fill_float_parameters(model, weights):
    first, second, third = list(weights)[:3]
    large = np.finfo(np.float32).max
    # whose float32 sum is Inf
    load_weights(model, dict(weights, **{first: np.full_like(weights[first], large)}), "large")
    bad = {
        first: np.zeros(weights[first].shape, np.int32),
        second: np.full(weights[second].shape, 2.0 * large, np.float64),
    }
    bad[third] = np.zeros_like(weights[third])
    bad[third].flat[0], bad[third].flat[-1] = np.inf, -np.inf
    with pytest.raises(ValueError, match=f"not of floats: 1 .{first} int32.; with NaN or Inf: 2 "):
        load_weights(model, weights | bad, "bad")
    load_weights(model, weights, "good")


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="models/README.md"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="not a readable"):
        read_checkpoint(tmp_path / "text.ckpt")


def test_a_failed_save_leaves_the_old_file(tmp_path, model):
    path = tmp_path / "model.ckpt"
    save_weights(weights_of(model), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'b': an array of dtype <U8 cannot be stored"):
        save_weights({"a": np.zeros(3), "b": "no array"}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_recorded_checksum_is_compared(tmp_path, weights):
    """One bit of one value, which the format itself does not notice."""
    path = tmp_path / "a.ckpt"
    save_weights(weights, path, record=True)
    assert (
        tmp_path / "checkpoints.sha256"
    ).read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  a.ckpt\n"
    read_checkpoint(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.ckpt: not what was written, its SHA-256 differs"):
        read_checkpoint(path)
    (tmp_path / "checkpoints.sha256").unlink()
    read_checkpoint(path)


def test_values_that_are_blanked_leave_shapes_and_dtypes():
    model = random_model(in_half(SHALLOW))
    before = weights_as_arrays(model)
    blank_values(model)
    after = weights_as_arrays(model)
    assert {n: (v.shape, v.dtype) for n, v in after.items()} == {
        n: (v.shape, v.dtype) for n, v in before.items()
    }
    assert any(value.any() for value in before.values()) and not any(value.any() for value in after.values())
