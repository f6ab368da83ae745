"""What people have: single files and folders of any kind are read, bit by bit; what is no model says so."""

import json
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import DEEP, SHALLOW, V1, official_table, random_model, torch_networks, weights_as_arrays
from safetensors.torch import load_file, save_file

from ldm.networks.latent_diffusion import build_model
from ldm.weights.arrays import ArraysInMemory
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.choice import choose_config
from ldm.weights.diffusers_folder import folder_files
from ldm.weights.layouts import DIFFUSERS, MINDSPORE, STABILITY, as_named_in, layout_of
from ldm.weights.source import open_weights
from ldm.weights.stability_names import stability_names

CONFIGS = {"stable_diffusion_2": SHALLOW, "stable_diffusion_1": V1}
WEIGHTS = {}


@pytest.fixture(params=CONFIGS)
def given(request):
    """A model's configuration and weights."""
    if request.param not in WEIGHTS:
        WEIGHTS[request.param] = weights_as_arrays(random_model(CONFIGS[request.param]))
    return CONFIGS[request.param], WEIGHTS[request.param]


def tensors(arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays}


def single_file(config, weights) -> dict[str, torch.Tensor]:
    """Under Stability's names."""
    return tensors(as_named_in(STABILITY, ArraysInMemory(weights), config))


def assert_loads(path, config, weights, dtype=np.float32, variant=None, use_averages=False):
    """Into float32 parameters, as the values that `dtype` has of the weights."""
    model = build_model(config)
    load_checkpoint(model, open_weights(path, variant, use_averages), use_averages)
    loaded = weights_as_arrays(model)
    assert loaded.keys() == weights.keys()
    for name, values in weights.items():
        wanted = (
            torch.from_numpy(values).to(dtype).float().numpy() if isinstance(dtype, torch.dtype) else values
        )
        assert loaded[name].dtype == np.float32 and np.array_equal(loaded[name], wanted), name


@pytest.mark.parametrize("version, is_open_clip", [("v1", False), ("v2_base", True)])
def test_every_name_in_a_file_of_stability(version, is_open_clip):
    for name, (_, theirs) in official_table(version).items():
        assert stability_names(name, is_open_clip) == theirs, name


def test_layouts_are_told_apart(given):
    config, weights = given
    arrays = ArraysInMemory(weights)
    assert layout_of(arrays) == MINDSPORE
    assert layout_of(as_named_in(STABILITY, arrays, config)) == STABILITY
    assert layout_of(as_named_in(DIFFUSERS, arrays, config)) == DIFFUSERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_single_file_in_any_precision(tmp_path, given, dtype):
    config, weights = given
    save_file(
        {k: v.to(dtype) for k, v in single_file(config, weights).items()}, tmp_path / "model.safetensors"
    )
    assert_loads(tmp_path / "model.safetensors", config, weights, dtype)


def flattened(entries):
    """The text encoder as transformers 5.6 and later name it."""
    return {name.replace("transformer.text_model.", "transformer."): value for name, value in entries.items()}


def of_comfy(entries):
    """SD2's text encoder in ComfyUI's naming."""
    return {
        k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): v for k, v in entries.items()
    }


@pytest.mark.parametrize("spelled", [flattened, of_comfy])
def test_other_spellings_of_the_text_encoder(tmp_path, given, spelled):
    config, weights = given
    save_file(spelled(single_file(config, weights)), tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", config, weights)


def test_the_vaes_attention_as_diffusers_names_it(tmp_path, given):
    """In a single file, as matrices: converters since 2023 write it so."""
    config, weights = given
    spelled, renamed = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}, {}
    for name, value in single_file(config, weights).items():
        for old, new in spelled.items():
            if f".mid.attn_1.{old}." in name:
                name, value = (
                    name.replace(f".{old}.", f".{new}."),
                    value.flatten(1) if value.ndim == 4 else value,
                )
        renamed[name] = value.clone()
    assert sum(".mid.attn_1.to_" in name for name in renamed) == 16
    save_file(renamed, tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", config, weights)


def test_stable_diffusion_2_with_the_text_encoder_of_transformers(tmp_path):
    """As some trainers save it."""
    weights = weights_as_arrays(random_model(SHALLOW))
    clip = {k: v for k, v in single_file(V1, weights).items() if k.startswith("cond_stage_model.")}
    rest = {k: v for k, v in single_file(SHALLOW, weights).items() if not k.startswith("cond_stage_model.")}
    save_file(rest | clip, tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", SHALLOW, weights)


def test_projections_as_matrices_or_convolutions(tmp_path, given):
    """Both are the same values; kohya's trainer writes SD2's as convolutions."""
    config, weights = given
    turned = {
        k: v[..., None, None] if v.ndim == 2 else v[:, :, 0, 0] if v.shape[2:] == (1, 1) else v
        for k, v in single_file(config, weights).items()
        if ".proj_in.weight" in k or ".proj_out.weight" in k
    }
    assert turned
    save_file(single_file(config, weights) | turned, tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", config, weights)


def extras(config) -> dict[str, torch.Tensor]:
    """What published files hold beside the weights."""
    layers = config.text_encoder.layers
    return {
        "alphas_cumprod": torch.linspace(1, 0, 1000), "betas": torch.ones(1000),
        "scale_factor": torch.ones(()),
        "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones((), dtype=torch.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.model.text_projection": torch.ones(4, 4),
        "cond_stage_model.model.logit_scale": torch.ones(()),
        "cond_stage_model.model.attn_mask": torch.ones(77, 77),
        "first_stage_model.loss.logvar": torch.ones(()),
        f"cond_stage_model.model.transformer.resblocks.{layers}.ln_1.weight": torch.ones(48),
        f"cond_stage_model.transformer.text_model.encoder.layers.{layers}.mlp.fc1.bias": torch.ones(48),
        "safety_checker.vision_model.weight": torch.ones(3), "embedding_manager.a": torch.ones(3),
        "denoiser.sigmas": torch.ones(3),
    }  # fmt: skip


def test_what_is_known_and_unused_is_left_out_and_said(tmp_path, given, caplog):
    config, weights = given
    caplog.set_level("INFO")
    save_file(single_file(config, weights) | extras(config), tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", config, weights)
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    for kind in ("noise schedule", "averaged weights", "never read", "VAE's training", "safety checker"):
        assert kind in line


def test_anything_else_refuses_the_file(tmp_path, given):
    config, weights = given
    layers = config.text_encoder.layers + 1
    for name in (
        f"cond_stage_model.model.transformer.resblocks.{layers}.ln_1.weight",
        "surplus",
        "model.surplus",
    ):
        save_file(single_file(config, weights) | {name: torch.ones(3)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"not of this model: 1 .{name}"):
            load_checkpoint(build_model(config), tmp_path / "model.safetensors")


def test_averaged_weights(tmp_path, given):
    config, weights = given
    plain = single_file(config, weights)
    averages = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
        for k, v in plain.items()
        if k.startswith("model.diffusion_model.")
    }
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    save_file(plain | averages, tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", config, weights)
    moved = {k: v + 1 if k.startswith("model.") else v for k, v in weights.items()}
    assert_loads(tmp_path / "model.safetensors", config, moved, use_averages=True)
    save_file(plain, tmp_path / "without.safetensors")
    with pytest.raises(ValueError, match="has no averaged weights"):
        load_checkpoint(build_model(config), tmp_path / "without.safetensors", use_averages=True)


class ModelCheckpoint:
    """As PyTorch Lightning's, which an old checkpoint names as a key."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def save_as_lightning(entries, path):
    """torch.save with what Lightning puts beside the weights: classes not installed, NumPy's scalars."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is ModelCheckpoint:
                self.write(b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = pickle._Pickler.dispatch | {type: lambda self, obj: self.save_global(obj)}

    class Module:
        """What torch.save uses of the module pickle."""

        __name__ = "pickle"
        HIGHEST_PROTOCOL, PickleError = pickle.HIGHEST_PROTOCOL, pickle.PickleError

    Module.Pickler, Module.dumps = Pickler, staticmethod(pickle.dumps)
    state = {"best_model_score": np.float64(0.5), "best_model_path": "x.ckpt"}
    content = {"state_dict": OrderedDict(entries), "epoch": 3, "global_step": 875000, "lr_schedulers": [],
               "callbacks": {ModelCheckpoint: state},
               "optimizer_states": [{"step": torch.ones(2)}]}  # fmt: skip
    torch.save(content, path, pickle_module=Module)


def test_a_checkpoint_of_pytorch_lightning(tmp_path, given):
    config, weights = given
    save_as_lightning(single_file(config, weights), tmp_path / "model.ckpt")
    assert b"ModelCheckpoint" in (tmp_path / "model.ckpt").read_bytes()
    assert open_weights(tmp_path / "model.ckpt").global_step == 875000
    assert_loads(tmp_path / "model.ckpt", config, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_from_before_pytorch_1_6(tmp_path, given, dtype):
    config, weights = given
    entries = {k: v.to(dtype) for k, v in single_file(config, weights).items()}
    torch.save(entries, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "model.pt", config, weights, dtype)


def diffusers_folder(folder, config, weights, **how):
    """As diffusers and transformers save it."""
    for name, text in folder_files(config).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for part, network in zip(("unet", "vae", "text_encoder"), torch_networks(weights, config)):
        network.save_pretrained(folder / part, **how)
    return folder


HOWS = {
    "plain": {}, "bin": {"safe_serialization": False}, "shards": {"max_shard_size": "200KB"},
    "fp16": {"variant": "fp16"}, "shards of a variant": {"max_shard_size": "200KB", "variant": "fp16"},
}  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_a_folder_that_diffusers_saved(tmp_path, given, how):
    config, weights = given
    try:
        folder = diffusers_folder(tmp_path / "model", config, weights, **HOWS[how])
    except (ValueError, TypeError) as error:  # transformers saves safetensors only, by now
        assert how == "bin", error
        folder = diffusers_folder(tmp_path / "model", config, weights)
        for path in list(folder.rglob("*.safetensors")):
            name = "pytorch_model.bin" if path.parent.name == "text_encoder" else f"{path.stem}.bin"
            torch.save(load_file(path), path.with_name(name))
            path.unlink()
    files = [path.name for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin")]
    assert len(files) > 3 if "shards" in how else len(files) == 3
    source = open_weights(folder)
    assert choose_config(source).config == config
    assert_loads(folder, config, weights)


def test_variants(tmp_path, given):
    """The plain one, unless another is asked for; the only one, where there is one only."""
    config, weights = given
    folder = diffusers_folder(tmp_path / "model", config, weights)
    half = diffusers_folder(tmp_path / "half", config, {k: v + 1 for k, v in weights.items()}, variant="fp16")
    for path in half.rglob("*.fp16.safetensors"):
        path.rename(folder / path.relative_to(half))
    assert_loads(folder, config, weights)
    assert_loads(folder, config, {k: v + 1 for k, v in weights.items()}, variant="fp16")
    assert_loads(folder, config, weights, variant="bf16")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    # of the VAE only fp16 is left: it is taken, whatever was asked for
    assert open_weights(folder, variant="bf16").arrays["vae/encoder.conv_in.weight"].size
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(ValueError, match="unet: has the variants fp16, non_ema: choose one with --variant"):
        open_weights(folder)


def test_folders_of_2022(tmp_path, given):
    """The VAE's attention under its first names, a buffer in the text encoder, no `text_model.`."""
    config, weights = given
    folder = diffusers_folder(tmp_path / "model", config, weights)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    entries = load_file(path)
    for new, old in older.items():
        entries = {name.replace(f".{new}.", f".{old}."): value for name, value in entries.items()}
    # as 1x1 convolutions
    entries = {
        k: v[..., None, None] if ".attentions." in k and v.ndim == 2 else v for k, v in entries.items()
    }
    assert sum("proj_attn" in name for name in entries) == 4
    save_file(entries, path)
    path = folder / "text_encoder/model.safetensors"
    entries = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    for prefix in ("", "text_model."):
        named = {prefix + name: value for name, value in entries.items()}
        save_file(named | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
        assert_loads(folder, config, weights)


def test_averages_of_a_folder(tmp_path, given):
    config, weights = given
    folder = diffusers_folder(tmp_path / "model", config, weights)
    with pytest.raises(ValueError, match="unet_ema"):
        open_weights(folder, use_averages=True)
    moved = {k: v + 1 if k.startswith("model.") else v for k, v in weights.items()}
    torch_networks(moved, config)[0].save_pretrained(folder / "unet_ema")
    assert_loads(folder, config, moved, use_averages=True)
    assert_loads(folder, config, weights)


def test_incomplete_folders(tmp_path):
    folder = diffusers_folder(
        tmp_path / "model", DEEP, weights_as_arrays(random_model(DEEP)), max_shard_size="200KB"
    )
    shard = next((folder / "unet").glob("*00001-of*"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00001-of.*: no such file, which .*index.json names"):
        open_weights(folder)
    shard.write_bytes(content)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match="not an index of shards"):
        open_weights(folder)
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        open_weights(folder)
    with pytest.raises(FileNotFoundError, match="none of diffusers"):
        open_weights(folder / "unet")
