"""Saved states: a training that is taken up again, and what is refused."""

import dataclasses
import json

import mindspore as ms
import numpy as np
import pytest
from conftest import SHALLOW, in_half, random_model
from trainings import OPTIONS, make_samples, make_trainer, weights_of_trainer

from ldm.files import partial_path, remove_partial_files
from ldm.run import states as states_module
from ldm.run.states import States, read_state
from ldm.weights.arrays import as_numpy

ORIGIN = {"seed": 1}


def resumed_equals_uninterrupted(folder, config, options, stop, steps, in_its_own_trainer=True):
    """A training saves its state and goes on; another one, of a new process as it were, takes it up there.

    Not `in_its_own_trainer`: the same one does, after all that a state has was overwritten, which compiles
    its graphs once.
    """
    samples = make_samples(folder, options)
    states = States(folder / "states", 2)
    whole = again = make_trainer(random_model(config), config, options, samples)
    if in_its_own_trainer:
        again = make_trainer(random_model(config), config, options, samples, start=stop)
    for _ in range(stop):
        whole.one_update()
    states.save(*whole.state(), ORIGIN)
    losses = [whole.one_update()[0] for _ in range(steps - stop)]
    arrays, counters = whole.state()
    arrays = {name: as_numpy(value).copy() for name, value in arrays.items()}
    weights = {name: values.copy() for name, values in weights_of_trainer(whole).items()}
    if again is whole:
        forget(again)
    state = states.latest()
    assert state.origin == ORIGIN
    again.restore(state.arrays(), state.progress, str(state.path))
    assert again.global_step == stop
    assert np.array_equal(losses, [again.one_update()[0] for _ in range(steps - stop)])
    for name, value in again.state()[0].items():
        assert np.array_equal(arrays.pop(name), as_numpy(value)), name
    assert not arrays and counters == again.state()[1]
    resumed = weights_of_trainer(again)
    assert all(np.array_equal(values, resumed[name]) for name, values in weights.items())


def forget(trainer) -> None:
    """Overwrite every array of a trainer's state."""
    for parameters in trainer._state_arrays().values():
        for parameter in parameters:
            parameter.set_data(ms.Tensor(np.full(parameter.shape, 0.5, np.float32)))


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    """Text encoder, accumulation, EMA, clipping, a warm-up that is not over; the batch divides no epoch."""
    options = dataclasses.replace(
        OPTIONS, gradient_accumulation_steps=2, use_ema=True, clip_grad=True, max_grad_norm=0.5,
        warmup_steps=4, train_batch_size=3
    )  # fmt: skip
    resumed_equals_uninterrupted(tmp_path, SHALLOW, options, 2, 5)


def test_a_resumed_lora_training_ends_with_the_same_bits(tmp_path):
    """Its state holds the additions and their moments and averages, nothing of the networks."""
    options = dataclasses.replace(
        OPTIONS, use_lora=True, lora_targets="+feed_forward", gradient_accumulation_steps=2, use_ema=True,
        clip_grad=True,
    )  # fmt: skip
    resumed_equals_uninterrupted(tmp_path, SHALLOW, options, 2, 4)
    (state,) = (tmp_path / "states").iterdir()
    names = read_state(state).arrays().keys()
    assert all(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in names)
    assert {name.split(".")[0] for name in names} == {"model", "cond_stage_model", "adam_m", "adam_v", "ema"}


RECIPES = {  # together: what has to go with accumulation, float16, LoRA, EMA
    "adafactor_and_a_rate_of_the_text_encoder": (SHALLOW, 2, dict(
        optim="adafactor", use_ema=True, text_encoder_learning_rate=3e-5,
        lr_schedule="cosine", decay_steps=9, min_snr_gamma=5.0,
    )),
    "prodigy_lora_float16_a_word_text_encoder_frozen_before_the_state": (in_half(SHALLOW), 2, dict(
        optim="prodigy", start_learning_rate=1.0, use_lora=True, train_token="sks", text_encoder_stop=0.02,
        noise_offset=0.1, caption_dropout=0.3, clip_grad=True, use_ema=True,
    )),
    "lion_and_a_word_of_a_frozen_text_encoder": (SHALLOW, 2, dict(
        optim="lion", train_text_encoder=False, train_token="sks", token_learning_rate=1e-2, image_fit="pad",
        masked_loss=True, min_timestep=100, gradient_accumulation_steps=2,
    )),
}  # fmt: skip


@pytest.mark.parametrize("config, stop, recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_recipe_ends_with_the_same_bits(tmp_path, config, stop, recipe):
    options = dataclasses.replace(OPTIONS, **recipe)
    resumed_equals_uninterrupted(tmp_path, config, options, stop, 4, in_its_own_trainer=False)


def test_the_loss_scale_and_its_counter_are_kept(tmp_path):
    options = dataclasses.replace(OPTIONS, init_loss_scale=2.0**40, loss_scale_factor=2.0**14, scale_window=2)
    resumed_equals_uninterrupted(tmp_path, in_half(SHALLOW), options, 3, 6, in_its_own_trainer=False)


def test_the_loss_scale_goes_over_between_float16_runs_only(tmp_path):
    """And what it grows by is what the options say now."""
    samples, half = make_samples(tmp_path, OPTIONS), in_half(SHALLOW)
    changed = dataclasses.replace(OPTIONS, loss_scale_factor=4.0, scale_window=7)
    saved = make_trainer(random_model(half), half, OPTIONS, samples)
    saved.loss_scale.value, saved.loss_scale.good_updates, saved.skipped_in_a_row = 2.0**14, 3, 50
    for config, wanted in ((half, (2.0**14, 3)), (SHALLOW, (1.0, 0))):
        again = make_trainer(random_model(config), config, changed, samples)
        again.restore(
            {name: p.asnumpy() for name, p in saved.state()[0].items()},
            json.loads(json.dumps(saved.state()[1])),
            "saved",
        )
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
    assert saved.latest().arrays()["a"][0, 0] == 3 and saved.latest().progress == {"global_step": 3}


def test_damage_is_found_and_skipped(saved, caplog):
    file = saved.paths()[-1] / "state.ckpt"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="step_00000003: not a whole state of a run .*SHA-256"):
        read_state(saved.paths()[-1])
    assert saved.latest().arrays()["a"][0, 0] == 2 and "skipping damaged state" in caplog.text
    (saved.paths()[0] / "manifest.json").write_text("{")
    assert saved.latest() is None


def test_what_is_no_state_stays(saved):
    """A file of a user's, and folders with other names."""
    (saved.folder / "step_5").write_text("mine")
    (saved.folder / "step_abc").mkdir()
    assert saved.latest().progress == {"global_step": 3}
    saved.save({"a": np.zeros((2, 3), np.float32)}, {"global_step": 4}, ORIGIN)
    assert (saved.folder / "step_5").read_text() == "mine" and (saved.folder / "step_abc").exists()


def test_a_state_that_is_written_again_replaces_the_first(saved):
    saved.save({"a": np.zeros((2, 3), np.float32)}, {"global_step": 3}, ORIGIN)
    assert not saved.latest().arrays()["a"].any() and len(saved.paths()) == 2


def test_states_of_a_course_that_was_left_go_once_the_new_one_is_saved(saved):
    """Taken up again at update 1, say because 2 and 3 are damaged: neither is taken for the newest, and the
    one just written stays.
    """
    States(saved.folder, 1).save({"a": np.full((2, 3), 9, np.float32)}, {"global_step": 2}, ORIGIN)
    assert [path.name for path in saved.paths()] == ["step_00000002"] and saved.latest().arrays()["a"][
        0, 0
    ] == 9


def test_an_unfinished_state_is_none(saved):
    partial = partial_path(saved.folder / "step_00000004")
    partial.mkdir()
    (partial / "state.ckpt").write_bytes(b"half")
    assert saved.latest().progress["global_step"] == 3
    remove_partial_files(saved.folder)  # which this process may be writing
    assert partial.exists()
    remove_partial_files(saved.folder, is_locked=True)
    assert not partial.exists()


def test_a_state_of_another_configuration_is_refused(tmp_path, saved):
    trainer = make_trainer(random_model(SHALLOW), SHALLOW, OPTIONS, make_samples(tmp_path, OPTIONS))
    with pytest.raises(
        ValueError, match="step_00000003: does not match the model configuration: parameters missing"
    ):
        trainer.restore(saved.latest().arrays(), saved.latest().progress, str(saved.latest().path))
    assert trainer.global_step == 0


def test_when_a_state_is_due(tmp_path, monkeypatch):
    """At a checkpoint, so many minutes after the last state; at the end of a run only where every checkpoint
    has one.
    """
    now = [0.0]
    monkeypatch.setattr(states_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(states_module.time, "time", lambda: -now[0])  # a clock that jumps changes nothing
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
