"""Every format into every other: bit-equal in float32, rounded as PyTorch rounds; whole or not at all."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHALLOW, V1, random_model, read_checkpoint, weights_as_arrays
from convert_checkpoint import main
from omegaconf import OmegaConf

from ldm.networks.latent_diffusion import build_model
from ldm.run.checkpoints import remove_old_checkpoints
from ldm.weights import writing
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.digests import record_digests, recorded_digests
from ldm.weights.writing import save_weights

TARGETS = {
    "mindspore": "model.ckpt", "stability": "model.safetensors", "diffusers": "model",
    "safetensors": "official.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module", params=[SHALLOW, V1], ids=["stable_diffusion_2", "stable_diffusion_1"])
def start(request, tmp_path_factory):
    """A folder with a model in the first format, its configuration, and the weights."""
    folder = tmp_path_factory.mktemp("start")
    weights = weights_as_arrays(random_model(request.param))
    save_weights(weights, folder / "start.ckpt")
    (folder / "model.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(request.param)))
    return folder, request.param, weights


def convert(folder, *words):
    main([*map(str, words), "--config", str(folder / "model.yaml")])


def loaded(path, config) -> dict[str, np.ndarray]:
    model = build_model(config)
    load_checkpoint(model, path)
    return weights_as_arrays(model)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], values) for name, values in wanted.items())


def test_round_trips_are_bit_equal(tmp_path, start):
    """From each format into each, and once around."""
    folder, config, weights = start
    for to, name in TARGETS.items():
        convert(folder, folder / "start.ckpt", tmp_path / name, "--to", to)
        assert_same(loaded(tmp_path / name, config), weights)
        for other, back in TARGETS.items():
            target = tmp_path / f"from {to}" / back
            convert(folder, tmp_path / name, target, "--to", other)
            assert_same(loaded(target, config), weights)
    assert (tmp_path / "from diffusers/model.ckpt").read_bytes() == (folder / "start.ckpt").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_precisions_are_rounded_as_pytorch_rounds(tmp_path, start, dtype):
    folder, config, weights = start
    rounded = {k: torch.from_numpy(v).to(getattr(torch, dtype)).float().numpy() for k, v in weights.items()}
    for to, name in TARGETS.items():
        convert(folder, folder / "start.ckpt", tmp_path / name, "--to", to, "--dtype", dtype)
        assert_same(loaded(tmp_path / name, config), rounded)


def test_the_format_follows_from_the_name(tmp_path, start, capsys):
    folder, config, _ = start
    convert(folder, folder / "start.ckpt", tmp_path / "a.safetensors")
    assert "model.diffusion_model.input_blocks.0.0.weight" in read_checkpoint(tmp_path / "a.safetensors")
    convert(folder, tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    assert (tmp_path / "b.ckpt").is_file() and (tmp_path / "b.ckpt").read_bytes()[:1] == b"\n"
    convert(folder, tmp_path / "a.safetensors", tmp_path / "c")
    assert (tmp_path / "c/model_index.json").is_file()
    for name in ("a.safetensors", "b.ckpt", "c"):
        with pytest.raises(SystemExit) as end:
            convert(folder, folder / "start.ckpt", tmp_path / name)
        assert end.value.code == 2 and f"{name}: exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(folder, folder / "start.ckpt", tmp_path / "d.pt")
    assert "must end with .ckpt (MindSpore), .safetensors, or be a folder's name" in capsys.readouterr().err
    names = recorded_digests(tmp_path)
    assert {"a.safetensors", "b.ckpt", "c/unet/diffusion_pytorch_model.safetensors"} < names.keys()
    subprocess.run(["sha256sum", "--check", "--quiet", "checkpoints.sha256"], cwd=tmp_path, check=True)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.ckpt", "c", "checkpoints.sha256"]


def test_what_is_converted_into_a_runs_folder_is_not_the_runs(tmp_path, start):
    """It is neither removed with the run's older checkpoints nor taken for what the run made."""
    folder, _, weights = start
    run = tmp_path / "run"
    save_weights(weights, run / "dreambooth_epoch_1.ckpt", record=True)
    (run / "run.json").write_text("{}")
    for name in ("dreambooth_epoch_1.safetensors", "dreambooth_epoch_1"):
        convert(folder, run / "dreambooth_epoch_1.ckpt", run / name)
    save_weights(weights, run / "dreambooth_epoch_5.ckpt", record=True)
    assert remove_old_checkpoints(run, "epoch_5", 1) == [run / "dreambooth_epoch_1.ckpt"]
    assert (run / "dreambooth_epoch_1.safetensors").is_file() and (run / "dreambooth_epoch_1/unet").is_dir()


def test_a_name_that_contradicts_the_format_is_refused(tmp_path, start, capsys):
    folder, *_ = start
    for name, to in (("a.safetensors", "mindspore"), ("a.ckpt", "stability"), ("a.ckpt", "diffusers")):
        with pytest.raises(SystemExit):
            convert(folder, folder / "start.ckpt", tmp_path / name, "--to", to)
        assert name in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_lines_of_the_user_in_the_list_of_digests_stay(tmp_path):
    (tmp_path / "checkpoints.sha256").write_text("# mine\n" + "0" * 64 + " *binary.bin\n")
    record_digests(tmp_path, {"a.ckpt": "1" * 64})
    assert (tmp_path / "checkpoints.sha256").read_text().startswith("# mine\n")
    assert recorded_digests(tmp_path) == {"binary.bin": "0" * 64, "a.ckpt": "1" * 64}


def test_what_float16_cannot_hold_is_refused(tmp_path, start, capsys):
    folder, config, weights = start
    name = "model.diffusion_model.out.2.conv.bias"
    for values, dtype, wanted in (
        (1e6, "float16", "values too large for float16"),
        (np.nan, "float32", "NaN"),
    ):
        save_weights(weights | {name: np.full_like(weights[name], values)}, tmp_path / "large.ckpt")
        for target in ("half.safetensors", "half", "half.ckpt"):
            with pytest.raises(SystemExit):
                convert(folder, tmp_path / "large.ckpt", tmp_path / target, "--dtype", dtype)
            assert f"{name} has {wanted}" in capsys.readouterr().err
        assert os.listdir(tmp_path) == ["large.ckpt"]


@pytest.mark.parametrize("target", ["model.ckpt", "model.safetensors", "model"])
def test_another_value_read_back_leaves_nothing(tmp_path, start, target, monkeypatch):
    _, config, weights = start
    monkeypatch.setattr(writing, "read_file", lambda path: {name: np.zeros(1) for name in weights} | Zeros())
    with pytest.raises(ValueError, match="was not read back as it was written"):
        save_weights(weights, tmp_path / target, config=config, compare=True, record=True)
    assert not any(path.name.startswith("model") for path in tmp_path.iterdir())


class Zeros(dict):
    def __ror__(self, other):
        return self

    def __missing__(self, name):
        return np.zeros(1)


MEMORY = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/scripts"]
import convert_checkpoint
from ldm.networks import latent_diffusion

def megabytes(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

before = megabytes("VmRSS")
convert_checkpoint.main(sys.argv[2:])
print(megabytes("VmHWM") - before)
"""


def test_conversion_streams(tmp_path):
    """A model of 230 MB, whose largest tensor has 66 MB."""
    config = dataclasses.replace(
        SHALLOW,
        unet=dataclasses.replace(SHALLOW.unet, context_dim=336, model_channels=160, head_channels=32),
        text_encoder=dataclasses.replace(SHALLOW.text_encoder, width=336),
    )
    (tmp_path / "model.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    save_weights(weights_as_arrays(random_model(config)), tmp_path / "large.ckpt")
    size = (tmp_path / "large.ckpt").stat().st_size / 2**20
    command = [sys.executable, "-c", MEMORY, str(ROOT), str(tmp_path / "large.ckpt"), str(tmp_path / "large")]
    command += ["--config", str(tmp_path / "model.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = float(done.stdout.split()[-1])
    print(f"{size:.0f} MB converted with {used:.0f} MB")
    assert used < 0.75 * size + 150  # MindSpore's own import is in it
