import hashlib

import mindspore as ms
import numpy as np
import pytest
from conftest import SHALLOW, random_model, weights_as_arrays
from safetensors.numpy import save_file

from ldm.networks.latent_diffusion import build_model
from ldm.weights.checkpoint import load_weights, read_checkpoint, save_weights, weights_of
from ldm.weights.diffusers_folder import diffusers_configs, read_diffusers_folder, write_diffusers_folder
from ldm.weights.diffusers_names import from_diffusers, to_diffusers


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


def test_conversion_to_diffusers_and_back(tmp_path, model, weights):
    folder = tmp_path / "diffusers"
    write_diffusers_folder(folder, weights, SHALLOW)
    shapes = {name: value.shape for name, value in weights.items()}
    back = from_diffusers(read_diffusers_folder(folder), shapes, SHALLOW)
    assert back.keys() == weights.keys() and all(
        np.array_equal(back[name], weights[name]) for name in weights
    )
    assert {p.name for p in folder.iterdir()} == diffusers_configs(SHALLOW).keys()
    with pytest.raises(FileExistsError):
        write_diffusers_folder(folder, weights, SHALLOW)


def test_the_vae_under_its_names_of_2022_is_converted_too(weights):
    parts, shapes = to_diffusers(weights, SHALLOW), {name: value.shape for name, value in weights.items()}
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in older.items():
        renamed = {name.replace(f".{new}.", f".{old}."): value for name, value in parts["vae"].items()}
        assert len(renamed.keys() - parts["vae"].keys()) == 4  # weight and bias, of encoder and decoder
        parts["vae"] = renamed
    back = from_diffusers(parts, shapes, SHALLOW)
    assert back.keys() == weights.keys() and all(
        np.array_equal(back[name], weights[name]) for name in weights
    )


def test_a_folder_with_pytorchs_older_files_is_converted_too(tmp_path, weights):
    """.bin files hold the same arrays, as float16, by the same names; a folder with neither is refused."""
    import torch

    folder, shapes = tmp_path / "diffusers", {name: value.shape for name, value in weights.items()}
    write_diffusers_folder(folder, weights, SHALLOW)
    older = {
        "unet": "diffusion_pytorch_model.bin",
        "vae": "diffusion_pytorch_model.bin",
        "text_encoder": "pytorch_model.bin",
    }
    for part, values in to_diffusers(weights, SHALLOW).items():
        torch.save(
            {name: torch.from_numpy(value.copy()).half() for name, value in values.items()},
            folder / part / older[part],
        )
        next((folder / part).glob("*.safetensors")).unlink()
    back = from_diffusers(read_diffusers_folder(folder), shapes, SHALLOW)
    assert all(np.array_equal(back[name], weights[name].astype(np.float16)) for name in weights)
    (folder / "unet/diffusion_pytorch_model.bin").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="diffusion_pytorch_model.safetensors: no such file, nor diffusion_pytorch_model.bin",
    ):
        read_diffusers_folder(folder)


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


def test_conversion_is_strict(weights):
    parts, shapes = to_diffusers(weights, SHALLOW), {name: value.shape for name, value in weights.items()}
    parts["unet"]["surplus"] = parts["unet"].pop("conv_in.weight")
    with pytest.raises(
        ValueError, match="1 parameters missing .*conv_in.weight.*1 not of this model .*surplus"
    ):
        from_diffusers(parts, shapes, SHALLOW)
