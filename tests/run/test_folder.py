"""What a run's output folder is used for, and how much it will take."""

import dataclasses
import json

import pytest
from conftest import ROOT

from ldm.config import read_model_config
from ldm.files import lock
from ldm.networks.latent_diffusion import build_model
from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.run import folder as folder_module
from ldm.run.folder import MetricsFile, RunFolder, sizes_of, space_needed
from ldm.run.recipe import Start
from ldm.training.trained import count_values


@pytest.fixture(autouse=True)
def no_logging(monkeypatch):
    monkeypatch.setattr(folder_module, "start_logging", lambda *arguments, **more: None)


def options_for(path, **changes) -> TrainOptions:
    return dataclasses.replace(TrainOptions(output_path=str(path)), **changes)


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    folder = RunFolder.open(options_for(tmp_path / "out"), ALONE)
    with pytest.raises(
        ValueError, match="out: another run is writing into it; give another folder or wait for its end"
    ):
        RunFolder.open(options_for(tmp_path / "out"), ALONE)
    RunFolder.open(options_for(tmp_path / "out"), Ranks(1, 1))  # another process of the same run only looks
    folder._lock.close()
    lock(tmp_path / "out/.lock")


def test_results_of_an_earlier_run_are_refused_unless_it_is_resumed(tmp_path):
    (tmp_path / "states/step_00000009").mkdir(parents=True)
    for resume in (None, str(tmp_path / "elsewhere/states/step_00000001")):
        with pytest.raises(
            ValueError, match="holds states/step_00000009 of an earlier run; give another folder, or --resume"
        ):
            RunFolder.open(options_for(tmp_path, resume=resume), ALONE)
    for resume in ("latest", str(tmp_path / "states/step_00000009")):
        RunFolder.open(options_for(tmp_path, resume=resume), ALONE)._lock.close()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    """In its own folder whoever it was, a machine of another name, say; in the class images' what this
    machine's gone processes left.
    """
    output, classes = tmp_path / "out", tmp_path / "classes"
    (output / "states/.step_00000004.container-1.7.part").mkdir(parents=True), classes.mkdir()
    (output / ".dreambooth_epoch_1.ckpt.container-1.7.part").touch()
    (output / ".notes.part").touch(), (classes / ".class_00001.png.container-1.7.part").touch()
    RunFolder.open(options_for(output, class_data_dir=str(classes)), ALONE)
    assert {path.name for path in output.iterdir()} == {"states", ".lock", ".notes.part"}
    assert not list((output / "states").iterdir()) and len(list(classes.iterdir())) == 1


def test_a_disk_that_is_too_small_is_said(tmp_path, monkeypatch, caplog):
    folder = RunFolder.open(options_for(tmp_path / "out"), ALONE)
    for free, warned in ((1, True), (10**10, False)):
        caplog.clear()
        monkeypatch.setattr(
            folder_module.shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free})
        )
        folder.space((10**7, 9 * 10**6), 3, Start())
        assert ("checkpoints and states to come need up to 0.3 GB, 0.0 GB are free" in caplog.text) == warned


def test_metrics_after_the_state_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile.open(path, 0)
    for step in (1, 2, 3):
        first.write({"global_step": step, "loss": float("nan")})
        if step == 1:
            first._file.write('{"global_st\n')  # a write that was cut short
    path.write_text(path.read_text().rstrip("\n"))
    MetricsFile.open(path, 2).write({"global_step": 3, "loss": 0.5})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["global_step"] for row in rows] == [1, 2, 3] and [row["loss"] for row in rows] == [
        None,
        None,
        0.5,
    ]


def full_size(**changes) -> tuple[TrainOptions, tuple[int, int, int]]:
    """Options, and the bytes of a checkpoint, a state and the frozen networks, at full size."""
    options, model = (
        TrainOptions(**changes),
        build_model(read_model_config(ROOT / "configs/train_dreambooth_sd_v2.yaml")),
    )
    return options, sizes_of(options, *count_values(model, options)[:2])


def test_the_documented_runs_fit_on_the_disk():
    """8 epochs in 60 GB, the 20 that are advised with a frozen text encoder in 80: with a state before every
    checkpoint but the last.
    """
    options, sizes = full_size()
    checkpoint, state, frozen = sizes
    assert [round(size / 1e9, 2) for size in sizes] == [5.16, 14.48, 0.33]
    # before the seventh: the old state and the new one
    assert space_needed(options, sizes, 8) == 6 * checkpoint + 2 * state <= 60e9
    assert space_needed(*full_size(epochs=20, train_text_encoder=False), 20) <= 80e9
    assert full_size(use_ema=True)[1] == (2 * checkpoint, state // 3 * 4, frozen)
    assert full_size(cache_latents=False)[1] == (checkpoint, state, 0)


@pytest.mark.parametrize("changes, to_come, there, wanted", [
    # checkpoints of 100, states of 30, frozen networks of 7 until the first checkpoint; by hand
    ({}, 1, (0, 0), 107), ({}, 2, (0, 0), 230), ({}, 3, (0, 0), 330), ({"keep_weights": 1}, 3, (0, 0), 230),
    ({"save_state_minutes": 0}, 1, (0, 0), 137), ({"save_every": 9}, 3, (0, 0), 330), ({"save_every": 9}, 1,
    (0, 0), 137),
    ({"save_state_minutes": None}, 3, (0, 0), 300), ({"save_state_minutes": None, "save_every": 9}, 1, (0, 0),
    137),
    ({"keep_states": 2}, 3, (0, 0), 360), ({}, 0, (8, 1), 0),
    ({"keep_weights": 2}, 2, (2, 1), 107), ({}, 2, (1, 1), 200),
])  # fmt: skip
def test_the_space_that_is_needed(changes, to_come, there, wanted):
    assert space_needed(TrainOptions(**changes), (100, 30, 7), to_come, *there) == wanted
