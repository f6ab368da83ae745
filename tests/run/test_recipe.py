"""Where --resume takes a training up, in every situation; and what it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import SHALLOW
from trainings import OPTIONS, make_samples

from ldm.options import TrainOptions
from ldm.run.recipe import RECORD, Start, find_start, origin_of, read_record, write_record
from ldm.run.states import States
from ldm.training.progress import Progress

A, B = {"seed": 1, "rate": 0.1}, {"seed": 1, "rate": 0.2}


@pytest.fixture
def run(tmp_path):
    """An output folder with states of the updates 2 and 3 of a run made of A, and one checkpoint."""
    states = States(tmp_path / "out/states", 2)
    for step in (2, 3):
        states.save({"a": np.full(2, step, np.float32)}, {"global_step": step}, A)
    (tmp_path / "out/dreambooth_epoch_1.ckpt").touch()
    write_record(tmp_path / "out", A)
    return states


def start_of(states, resume="latest") -> Start:
    return find_start(resume, states.folder.parent, states)


def without_states(states):
    shutil.rmtree(states.folder)


def damaged(states):
    for path in states.paths():
        (path / "manifest.json").unlink()


def test_from_the_newest_state(run):
    start = start_of(run)
    assert (start.global_step, start.origin, start.ended) == (3, A, None)
    assert start_of(run, str(run.paths()[0])).global_step == 2 and start_of(run, None) == Start()
    (run.folder.parent / RECORD).unlink()  # of a version before it
    assert start_of(run).origin == A


def test_a_fresh_folder_or_one_without_results_is_a_start_from_the_beginning(run, tmp_path):
    """Whatever was tried there before, with whatever options: a first step that ran out of memory, say."""
    assert start_of(States(tmp_path / "fresh/states", 1)) == Start()
    without_states(run), (run.folder.parent / "dreambooth_epoch_1.ckpt").unlink()
    start = start_of(run)
    assert start == Start()
    start.require_same(B, allowed=False), start.require_that_it_can_continue(10, tmp_path)


def test_killed_before_the_first_state_it_begins_again_as_it_was(run, caplog):
    without_states(run)
    start = start_of(run)
    assert (start.state, start.origin, start.global_step) == (
        None,
        A,
        0,
    ) and "starting from the beginning" in caplog.text
    start.require_same(A, allowed=False)
    for allowed in (False, True):  # its checkpoints would be overwritten by those of another training
        with pytest.raises(
            ValueError, match="changed since the run began: rate 0.1 -> 0.2; it has saved no state"
        ):
            start.require_same(B, allowed)


@pytest.mark.parametrize("record", [None, "not JSON", "[]", '{"origin": 3, "ended": null}', '{"origin": {}}'])
def test_results_without_states_or_record_are_refused(run, record):
    without_states(run)
    (run.folder.parent / RECORD).unlink() if record is None else (run.folder.parent / RECORD).write_text(
        record
    )
    with pytest.raises(
        ValueError, match="holds dreambooth_epoch_1.ckpt, but no state that can be read; give another folder"
    ):
        start_of(run)


def test_states_that_cannot_be_read_are_refused_and_stay(run):
    """They may be mended; and beginning again would overwrite hours of results."""
    damaged(run)
    with pytest.raises(ValueError, match="holds states/step_00000003, but no state that can be read"):
        start_of(run)
    assert len(run.paths()) == 2


def test_a_run_that_ended_is_done(run):
    write_record(run.folder.parent, A, ended=5)
    start = start_of(run)
    assert start.is_done(5) and start.is_done(4) and not start.is_done(6)
    assert not start.changes(A) and start.changes(B) == ["rate 0.1 -> 0.2"]
    start.require_that_it_can_continue(6, run.folder)  # from update 3 on, once more
    run.save({"a": np.zeros(2, np.float32)}, {"global_step": 5}, A)
    assert not start_of(run).is_done(5)  # a state of the end: checkpoints that are missing can be written
    without_states(run)
    start = start_of(run)
    assert start.is_done(5)
    with pytest.raises(
        ValueError,
        match=r"ended after 5 updates and kept no state to continue from .*--pretrained_model_path",
    ):
        start.require_that_it_can_continue(6, run.folder)


def test_options_that_were_changed_are_those_of_the_run_from_then_on(run, caplog):
    """Resumed from A's state with B, and killed before a state of its own, or ended."""
    start_of(run).require_same(B, allowed=True)
    assert "resume: changed: rate 0.1 -> 0.2" in caplog.text
    for ended in (None, 5):
        write_record(run.folder.parent, B, ended)
        start = start_of(run)
        start.require_same(B, allowed=False)
        assert start.is_done(5) == (ended == 5)
        with pytest.raises(
            ValueError,
            match="changed since the state was saved: rate 0.2 -> 0.1; --allow_changed_options=True",
        ):
            start.require_same(A, allowed=False)


def test_a_state_of_another_folder_brings_its_own_origin(run, tmp_path):
    # of a training that died there before its first update
    (
        (tmp_path / "new").mkdir(),
        write_record(tmp_path / "new", B),
    )
    start = find_start(str(run.paths()[-1]), tmp_path / "new", States(tmp_path / "new/states", 1))
    assert (start.global_step, start.origin, start.ended) == (3, A, None)


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_record(tmp_path, A, ended=7)
    assert read_record(tmp_path) == {"origin": A, "ended": 7} and read_record(tmp_path / "none") is None


def test_changes_are_listed(tmp_path, caplog, run):
    images = make_samples(tmp_path).subjects
    base = tmp_path / "base.ckpt"
    base.write_bytes(b"weights")
    options = dataclasses.replace(
        OPTIONS, pretrained_model_path=str(tmp_path), pretrained_model_file="base.ckpt"
    )

    def origin(**changes):
        changed = dataclasses.replace(options, **changes)
        return json.loads(
            json.dumps(origin_of(changed, SHALLOW, [changed.checkpoint], images, Progress.of(changed, 80, 1)))
        )

    start = Start(run.latest(), origin() | {"class pictures": "1"})
    harmless = dict(
        epochs=9,
        log_level="ERROR",
        save_every=3,
        output_path="elsewhere",
        cache_latents=False,
        recompute=True,
    )
    harmless |= dict(keep_weights=1, save_state_minutes=None, max_updates=7)
    start.require_same(origin(**harmless), allowed=False)
    # the same update, cut into other batches
    start.require_same(origin(train_batch_size=1, gradient_accumulation_steps=2), allowed=False)
    for name, value in dict(
        start_learning_rate=3e-4, seed=2, prior_loss_weight=0.5, instance_prompt="a dog", random_flip=False
    ).items():
        with pytest.raises(
            ValueError,
            match=f"changed since the state was saved: {name} {getattr(options, name)} -> {value};",
        ):
            start.require_same(origin(**{name: value}), allowed=False)
    recipes = dict(
        min_snr_gamma=5.0, noise_offset=0.1, captions="table", train_token="sks", lr_schedule="linear"
    )
    for name, value in recipes.items():  # a state of an older version knows nothing of them
        default = TrainOptions.facts_of_before()[name]
        older = {key: fact for key, fact in start.origin.items() if key not in recipes}
        for begun in (start, Start(start.state, older)):
            begun.require_same(origin(), allowed=False)
            with pytest.raises(ValueError, match=f"{name} {default} -> {value}"):
                begun.require_same(origin(**{name: value}), allowed=False)
        # and left out again
        with pytest.raises(ValueError, match=f"{name} {value} -> {default}"):
            Start(start.state, origin(**{name: value})).require_same(origin(), allowed=False)
    with pytest.raises(ValueError, match="instance pictures an update 2 -> 4"):
        start.require_same(origin(train_batch_size=4), allowed=False)
    base.write_bytes(b"others")
    pictures = images[0].pictures
    pictures[0].path.write_bytes(pictures[1].path.read_bytes())
    with pytest.raises(ValueError, match="instance pictures .*; base model "):
        start.require_same(origin(), allowed=False)
    with pytest.raises(ValueError, match="changed since the state was saved: class pictures 1 -> 2;"):
        start.require_same({"class pictures": "2"}, allowed=False)
    start.require_same(origin(), allowed=True)
    assert "resume: changed: base model" in caplog.text
