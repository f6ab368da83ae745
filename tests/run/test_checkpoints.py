"""The checkpoints of a run: whole models, of which only a run's own are ever removed."""

import subprocess
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import SHALLOW, random_model, read_checkpoint, weights_as_arrays

from ldm.networks.latent_diffusion import build_model
from ldm.options import TrainOptions
from ldm.run.checkpoints import Checkpoints, remove_old_checkpoints
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.digests import record_digests, recorded_digests
from ldm.weights.writing import DTYPES


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_checkpoint_is_whole_whether_or_not_its_frozen_part_was_set_aside(tmp_path, on_disk):
    """And in the order of the model; the second one takes the frozen part from the first."""
    model = random_model(SHALLOW)
    before, names = weights_as_arrays(model), model.parameter_names()
    checkpoints = Checkpoints(tmp_path, 10)
    network = weakref.ref(model.first_stage_model)
    checkpoints.take_frozen_from(model, TrainOptions(cache_latents=on_disk))
    assert not on_disk or network() is None  # out of memory
    assert not list(tmp_path.iterdir())  # the file of what was set aside has no name
    trained = {parameter.name: parameter for parameter in model.get_parameters()}
    averages = {name: parameter.asnumpy() + 1 for name, parameter in trained.items()}
    assert set(names) - trained.keys() == {name for name in names if name.startswith("first_stage_model.")}
    for epoch in (1, 2):
        paths = checkpoints.save(f"epoch_{epoch}", trained, averages)
        assert [path.name for path in paths] == [
            f"dreambooth_epoch_{epoch}.ckpt",
            f"dreambooth_epoch_{epoch}_ema.ckpt",
        ]
        plain, averaged = map(read_checkpoint, paths)
        assert list(plain) == list(averaged) == names
        for name, values in before.items():
            assert np.array_equal(plain[name], values)
            assert np.array_equal(averaged[name], values + (name in trained))


def test_a_checkpoint_that_a_kill_left_out_is_written(tmp_path):
    checkpoints, weights = Checkpoints(tmp_path, 10), {"a": np.ones(3, np.float32)}
    (path,) = checkpoints.save("epoch_1", weights, None)
    written = path.stat().st_mtime_ns
    checkpoints.save_if_missing("epoch_1", written, weights, None)
    assert path.stat().st_mtime_ns == written
    checkpoints.save_if_missing("epoch_1", written + 1, weights, None)  # of a run that was abandoned
    assert path.stat().st_mtime_ns > written
    path.unlink()
    checkpoints.save_if_missing("epoch_1", written, weights, None)
    assert path.exists()


def test_old_weights_go_but_for_the_newest_and_what_the_run_did_not_write(tmp_path):
    for name in ("1", "2", "2_ema", "3", "9"):
        path = tmp_path / f"dreambooth_epoch_{name}.ckpt"
        path.write_bytes(b"x")
        record_digests(path.parent, {path.name: name})
    own = [tmp_path / "dreambooth_epoch_0.ckpt", tmp_path / "dreambooth_epoch_1 copy.ckpt"]
    for path in own:
        path.write_bytes(b"the user's")
    record_digests(own[1].parent, {own[1].name: "x"})
    assert remove_old_checkpoints(tmp_path, "epoch_3", 2) == [tmp_path / "dreambooth_epoch_1.ckpt"]
    assert remove_old_checkpoints(tmp_path, "epoch_3", 2) == []
    # resumed before epoch 9: that is not the newest of the present course
    assert sorted(path.name for path in remove_old_checkpoints(tmp_path, "epoch_3", 1)) == [
        "dreambooth_epoch_2.ckpt",
        "dreambooth_epoch_2_ema.ckpt",
    ]
    left = {"dreambooth_epoch_3.ckpt", "dreambooth_epoch_9.ckpt", own[1].name}
    assert recorded_digests(tmp_path).keys() == left
    assert {path.name for path in tmp_path.iterdir()} == left | {own[0].name, "checkpoints.sha256"}


@pytest.mark.parametrize(
    "to, dtype", [("safetensors", "float32"), ("stability", "float16"), ("diffusers", "bfloat16")]
)
def test_other_formats(tmp_path, to, dtype):
    """Whole, recorded, opened again; the newest are kept, of epochs and of steps."""
    model = random_model(SHALLOW)
    weights = weights_as_arrays(model)
    checkpoints = Checkpoints(tmp_path, 2, to, dtype)
    checkpoints.take_frozen_from(model, TrainOptions())
    trained = {parameter.name: parameter for parameter in model.get_parameters()}
    for name in ("epoch_1", "step_100", "epoch_2", "step_200", "step_300", "epoch_3", "epoch_3"):
        checkpoints.save(name, trained, None)
    suffix = {"diffusers": ""}.get(to, ".safetensors")
    left = {f"dreambooth_{name}{suffix}" for name in ("epoch_2", "epoch_3", "step_200", "step_300")}
    assert {path.name for path in tmp_path.iterdir()} == left | {"checkpoints.sha256"}
    assert {Path(name).parts[0] for name in recorded_digests(tmp_path)} == left
    subprocess.run(["sha256sum", "--check", "--quiet", "checkpoints.sha256"], cwd=tmp_path, check=True)
    again = build_model(SHALLOW)
    load_checkpoint(again, tmp_path / f"dreambooth_step_300{suffix}")
    for name, values in weights_as_arrays(again).items():
        assert np.array_equal(values, weights[name].astype(DTYPES[dtype]).astype(np.float32)), name
