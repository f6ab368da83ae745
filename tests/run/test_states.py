"""Saved states: a training that is taken up again, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import ROOT, SHALLOW, in_half, random_model, weights_as_arrays
from trainings import OPTIONS, make_data, make_trainer

from ldm.config import read_model_config
from ldm.networks.latent_diffusion import build_model
from ldm.options import TrainOptions
from ldm.run import states as run_state
from ldm.run.states import MetricsFile, States, fingerprint, read_state, remove_old_weights, space_needed
from ldm.training.trainer import bytes_on_disk, checkpoints_to_come
from ldm.weights.checkpoint import record_digest, recorded_digests

ORIGIN = {"seed": 1}


def resumed_equals_uninterrupted(folder, config, options, stop, steps):
    """A training saves its state and goes on; another one, of a new process as it were, takes it up there."""
    data = make_data(folder, options)
    states = States(folder / "states", 2)
    whole, again = (make_trainer(random_model(config), config, options, data) for _ in range(2))
    for _ in range(stop):
        whole.one_update()
    states.save(*whole.state(), ORIGIN)
    losses = [whole.one_update()[0] for _ in range(steps - stop)]
    state = states.latest()
    assert state.origin == ORIGIN
    again.restore(state.arrays, state.progress, str(state.path))
    assert again.global_step == stop
    assert np.array_equal(losses, [again.one_update()[0] for _ in range(steps - stop)])
    for name, values in {name: p.asnumpy() for name, p in whole.state()[0].items()}.items():
        assert np.array_equal(values, again.state()[0][name].asnumpy()), name
    assert whole.state()[1] == again.state()[1]
    assert all(np.array_equal(values, weights_as_arrays(again.model)[name]) for name, values in weights_as_arrays(whole.model).items())


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    """Text encoder, accumulation, EMA, clipping, a warm-up that is not over; the batch divides no epoch."""
    options = dataclasses.replace(
        OPTIONS, gradient_accumulation_steps=2, use_ema=True, clip_grad=True, max_grad_norm=0.5, warmup_steps=4, train_batch_size=3
    )  # fmt: skip
    resumed_equals_uninterrupted(tmp_path, SHALLOW, options, 2, 5)


def test_the_loss_scale_and_its_counter_are_kept(tmp_path):
    options = dataclasses.replace(OPTIONS, init_loss_scale=2.0**40, loss_scale_factor=2.0**14, scale_window=2)
    resumed_equals_uninterrupted(tmp_path, in_half(SHALLOW), options, 3, 6)


def test_the_loss_scale_goes_over_between_float16_runs_only(tmp_path):
    """And what it grows by is what the options say now."""
    data, half = make_data(tmp_path, OPTIONS), in_half(SHALLOW)
    changed = dataclasses.replace(OPTIONS, loss_scale_factor=4.0, scale_window=7)
    saved = make_trainer(random_model(half), half, OPTIONS, data)
    saved.loss_scale.value, saved.loss_scale.good_updates, saved.skipped_in_a_row = 2.0**14, 3, 50
    for config, wanted in ((half, (2.0**14, 3)), (SHALLOW, (1.0, 0))):
        again = make_trainer(random_model(config), config, changed, data)
        again.restore({name: p.asnumpy() for name, p in saved.state()[0].items()}, json.loads(json.dumps(saved.state()[1])), "saved")
        assert (again.loss_scale.value, again.loss_scale.good_updates) == wanted
        assert (again.loss_scale.factor, again.loss_scale.window, again.skipped_in_a_row) == (4.0, 7, 0)


@pytest.fixture
def saved(tmp_path):
    """A folder with the states of updates 2 and 3 of a few arrays."""
    states = States(tmp_path / "states", 2)
    for step in (1, 2, 3):
        states.save({"a": np.full((2, 3), step, np.float32)}, {"global_step": step}, ORIGIN)
    return states


def test_the_newest_states_are_kept(saved):
    assert [path.name for path in saved.paths()] == ["step_00000002", "step_00000003"]
    assert saved.latest().arrays["a"][0, 0] == 3 and saved.latest().progress == {"global_step": 3}


def test_damage_is_found_and_passed_over(saved, caplog):
    file = saved.paths()[-1] / "state.ckpt"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="step_00000003: not a whole state of a run .*SHA-256"):
        read_state(saved.paths()[-1])
    assert saved.latest().arrays["a"][0, 0] == 2 and "passed over" in caplog.text
    (saved.paths()[0] / "manifest.json").write_text("{")
    assert saved.latest() is None


def test_a_state_that_is_written_again_replaces_the_first(saved):
    saved.save({"a": np.zeros((2, 3), np.float32)}, {"global_step": 3}, ORIGIN)
    assert not saved.latest().arrays["a"].any() and len(saved.paths()) == 2


def test_states_of_a_course_that_was_left_go_once_the_new_one_is_saved(saved):
    """Taken up again at update 1, say because 2 and 3 are damaged: neither is taken for the newest, and the one just written stays."""
    States(saved.folder, 1).save({"a": np.full((2, 3), 9, np.float32)}, {"global_step": 2}, ORIGIN)
    assert [path.name for path in saved.paths()] == ["step_00000002"] and saved.latest().arrays["a"][0, 0] == 9


def test_an_unfinished_state_is_none(saved):
    partial = saved.folder / ".step_00000004.part"
    partial.mkdir()
    (partial / "state.ckpt").write_bytes(b"half")
    assert saved.latest().progress["global_step"] == 3
    saved.remove_litter()
    assert not partial.exists()


def test_a_state_of_another_configuration_is_refused(tmp_path, saved):
    trainer = make_trainer(random_model(SHALLOW), SHALLOW, OPTIONS, make_data(tmp_path, OPTIONS))
    with pytest.raises(ValueError, match="step_00000003: does not fit the model configuration, parameters missing"):
        trainer.restore(saved.latest().arrays, saved.latest().progress, str(saved.latest().path))
    assert trainer.global_step == 0


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1"), b.write_bytes(b"1")
    assert len({fingerprint([a]), fingerprint([b]), fingerprint([a, b]), fingerprint([])}) == 4


def test_metrics_after_the_state_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.write({"global_step": step, "loss": float("nan")})
        if step == 1:
            first._file.write('{"global_st\n')  # a write that was cut short
    path.write_text(path.read_text().rstrip("\n"))
    MetricsFile(path, 2).write({"global_step": 3, "loss": 0.5})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["global_step"] for row in rows] == [1, 2, 3] and [row["loss"] for row in rows] == [None, None, 0.5]


def test_when_a_state_is_due(tmp_path, monkeypatch):
    """At a checkpoint, so many minutes after the last state; at the end of a run only where every checkpoint has one."""
    now = [0.0]
    monkeypatch.setattr(run_state.time, "monotonic", lambda: now[0])
    states, every, never = (States(tmp_path / "states", 1, minutes) for minutes in (15, 0, None))
    now[0] = 400.0
    states.start_clock()
    for minute, wanted in ((14, False), (15, True), (29, False), (30, True)):
        now[0] = 400.0 + 60 * minute
        assert states.is_due(run_ends=False) == wanted and not states.is_due(run_ends=True)
        assert every.is_due(False) and every.is_due(True) and not never.is_due(False)
        if wanted:
            states.save({"a": np.zeros(2, np.float32)}, {"global_step": minute}, ORIGIN)
    assert [path.name for path in states.paths()] == ["step_00000030"]


def test_old_weights_go_but_for_the_newest_and_what_the_run_did_not_write(tmp_path):
    for name in ("1", "2", "2_ema", "3", "9"):
        path = tmp_path / f"dreambooth_epoch_{name}.ckpt"
        path.write_bytes(b"x")
        record_digest(path, name)
    own = [tmp_path / "dreambooth_epoch_0.ckpt", tmp_path / "dreambooth_epoch_1 copy.ckpt"]
    for path in own:
        path.write_bytes(b"the user's")
    record_digest(own[1], "x")
    assert remove_old_weights(tmp_path, 3, 2) == [tmp_path / "dreambooth_epoch_1.ckpt"]
    assert remove_old_weights(tmp_path, 3, 2) == []
    # resumed before epoch 9: that is not the newest of the present course
    assert sorted(path.name for path in remove_old_weights(tmp_path, 3, 1)) == ["dreambooth_epoch_2.ckpt", "dreambooth_epoch_2_ema.ckpt"]
    left = {"dreambooth_epoch_3.ckpt", "dreambooth_epoch_9.ckpt", own[1].name}
    assert recorded_digests(tmp_path).keys() == left
    assert {path.name for path in tmp_path.iterdir()} == left | {own[0].name, "checkpoints.sha256"}


def full_size(**changes) -> tuple[TrainOptions, tuple[int, int, int]]:
    """Options, and the bytes of a checkpoint, a state and the frozen networks, of Stable Diffusion 2.0-base."""
    options = TrainOptions(**changes)
    return options, bytes_on_disk(build_model(read_model_config(ROOT / "configs/train_dreambooth_sd_v2.yaml")), options)


def test_the_documented_runs_fit_on_the_disk():
    """8 epochs in 60 GB, the 20 that are advised with a frozen text encoder in 80: with a state before every checkpoint but the last."""
    options, sizes = full_size()
    checkpoint, state, frozen = sizes
    assert [round(size / 1e9, 2) for size in sizes] == [5.16, 14.48, 0.33]
    assert space_needed(options, sizes, 8) == 6 * checkpoint + 2 * state <= 60e9  # before the seventh: the old state and the new one
    assert space_needed(*full_size(epochs=20, train_text_encoder=False), 20) <= 80e9
    assert full_size(use_ema=True)[1] == (2 * checkpoint, state // 3 * 4, frozen)
    assert full_size(cache_latents=False)[1] == (checkpoint, state, 0)


@pytest.mark.parametrize("changes, to_come, there, wanted", [
    # checkpoints of 100, states of 30, frozen networks of 7 until the first checkpoint; by hand
    ({}, 1, (0, 0), 107), ({}, 2, (0, 0), 230), ({}, 3, (0, 0), 330), ({"keep_weights": 1}, 3, (0, 0), 230),
    ({"save_state_minutes": 0}, 1, (0, 0), 137), ({"save_every": 9}, 3, (0, 0), 330), ({"save_every": 9}, 1, (0, 0), 137),
    ({"save_state_minutes": None}, 3, (0, 0), 300), ({"save_state_minutes": None, "save_every": 9}, 1, (0, 0), 137),
    ({"keep_checkpoints": 2}, 3, (0, 0), 360), ({}, 0, (8, 1), 0),
    ({"keep_weights": 2}, 2, (2, 1), 107), ({}, 2, (1, 1), 200),
])  # fmt: skip
def test_the_space_that_is_needed(changes, to_come, there, wanted):
    assert space_needed(TrainOptions(**changes), (100, 30, 7), to_come, *there) == wanted


def test_checkpoints_to_come():
    options = TrainOptions(train_batch_size=3, epochs=3, ckpt_save_interval=2)
    counts = [checkpoints_to_come(options, 8, global_step=step) for step in range(9)]  # epochs 2 (in update 6) and 3
    assert counts == [2, 2, 2, 2, 2, 2, 1, 1, 0]
