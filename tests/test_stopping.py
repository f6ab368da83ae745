"""Commands that are stopped, started twice, run out of space, or fail on numbers; and what is left
afterwards.
"""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess

import numpy as np
from commands import run, start, train, train_arguments, updates_done, wait_for
from conftest import ROOT, read_checkpoint

LONG = (
    "--epochs=1000",
    "--ckpt_save_interval=1000",
    "--gradient_accumulation_steps=2",
    "--use_ema=True",
    "--train_batch_size=1",
)


def assert_weights_of_the_state(place, folder, done) -> None:
    """--save_weights_every: what the state holds, to generate with; the state gives the same later."""
    assert [path.name for path in sorted(folder.glob("*.ckpt"))] == [
        f"dreambooth_step_{done}.ckpt",
        f"dreambooth_step_{done}_ema.ckpt",
    ]
    for ending, words in (("", ()), ("_ema", ("--use_ema_weights",))):
        made, written = place / f"of_state{ending}.ckpt", folder / f"dreambooth_step_{done}{ending}.ckpt"
        arguments = (folder / f"states/step_{done:08d}", "models/base.ckpt", made, *words)
        run(place, *map(str, arguments), script=ROOT / "scripts/weights_of_state.py")
        assert made.read_bytes() == written.read_bytes()
    state = f"--ckpt_path={folder}/states/step_{done:08d}/state.ckpt"
    drawn = run(place, "--config=model.yaml", state, status=2, script=ROOT / "text_to_image.py").stderr
    assert "the saved state of a training" in drawn and "scripts/weights_of_state.py" in drawn


def test_a_stopped_run_goes_on_as_if_it_had_not_been(place):
    """SIGTERM: the step in hand ends, the state is saved; a second run is refused meanwhile; another option
    is refused afterwards.
    """
    folder = place / "stopped"
    process = start(place, "--output_path=stopped", *LONG, "--save_weights_every=1000000")
    wait_for(lambda: updates_done(folder) >= 2)
    assert (
        "stopped: another run is writing into it"
        in train(place, "--output_path=stopped", "--resume=latest", status=2).stderr
    )
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    done = updates_done(folder)
    assert f"states/step_{done:08d}" in errors and errors.splitlines()[-1].startswith(
        "stopped; continue with: python "
    )
    assert errors.splitlines()[-1].endswith(" --resume=latest")
    assert [path.name for path in (folder / "states").iterdir()] == [f"step_{done:08d}"]
    assert_weights_of_the_state(place, folder, done)

    changes = ("--seed=5", "--prior_loss_weight=0.5", "--num_class_images=9")
    changed = train(place, "--output_path=stopped", *LONG, "--resume=latest", *changes, status=2).stderr
    assert "num_class_images 3 -> 9; prior_loss_weight 1.0 -> 0.5; seed 3407 -> 5" in changed
    assert len(list((place / "classes/dog").glob("*.png"))) == 3  # none is drawn for a run that is refused
    epochs = done * 2 // 5 + 2  # 5 samples an epoch, 2 an update; the last update ends it
    end = (*LONG, f"--epochs={epochs}", f"--ckpt_save_interval={epochs}")
    resumed = train(place, "--output_path=stopped", *end, "--resume=latest", "--save_state_minutes=0")
    assert f"resumed from stopped/states/step_{done:08d}: {done} of" in resumed.stderr
    whole = train(place, "--output_path=whole", *end)
    assert whole.returncode == 0
    for name in (f"dreambooth_epoch_{epochs}.ckpt", f"dreambooth_epoch_{epochs}_ema.ckpt"):
        ours, theirs = read_checkpoint(folder / name), read_checkpoint(place / "whole" / name)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()
    lines = [
        [json.loads(line)["loss"] for line in (place / f / "metrics.jsonl").read_text().splitlines()]
        for f in ("stopped", "whole")
    ]
    assert lines[0] == lines[1]
    written = {path: path.read_bytes() for path in folder.glob("dreambooth_epoch_*.ckpt")}
    older, lost = sorted(written)  # as if the run had been killed between its state and these checkpoints
    older.write_bytes(b"of a course that was left"), os.utime(older, (0, 0))
    lost.unlink()
    assert (
        "updates are done. To train longer"
        in train(place, "--output_path=stopped", *end, "--resume=latest").stderr
    )
    assert {path: path.read_bytes() for path in folder.glob("dreambooth_epoch_*.ckpt")} == written
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "checkpoints.sha256"], cwd=folder, capture_output=True, text=True
    )
    assert check.returncode == 0 and check.stdout.count(": OK") == 4


def test_ctrl_c_before_training_and_during_it(place):
    """Before, no step is in hand: it stops at once. During training the step ends and the state is saved."""
    for folder, moment in (
        (place / "early", (place / "early/train.log").exists),
        (place / "late", lambda: updates_done(place / "late") >= 3),
    ):
        process = start(place, f"--output_path={folder.name}", *LONG)
        wait_for(moment)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert (
            process.returncode == 130
            and "Traceback" not in errors
            and "stopped; continue with: python " in errors
        )
    assert not list((place / "early").glob("states/*")) and not list((place / "early").glob("*.ckpt"))
    assert [path.name for path in (place / "late/states").iterdir()] == [
        f"step_{updates_done(place / 'late'):08d}"
    ]
    assert_there_is_something_to_draw_with(place, errors)
    more = (*LONG, "--epochs=1", "--resume=latest")  # of which more is done already
    assert_there_is_something_to_draw_with(place, train(place, "--output_path=late", *more).stderr)


def assert_there_is_something_to_draw_with(place, errors) -> None:
    """In the middle of the first epoch, before any checkpoint, the log has the command that makes one."""
    command = errors.split("to draw with what it has learned so far: python scripts/")[1].splitlines()[0]
    script, *words = shlex.split(command)
    run(place, *words, script=ROOT / "scripts" / script)
    assert len(read_checkpoint(place / words[-1])) == len(read_checkpoint(place / "models/base.ckpt"))
    (place / words[-1]).unlink()


def files_below(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_that_cannot_be_written_leaves_the_last_good_state(place):
    """The file-size limit stands for a full disk: it fails in the middle of a write."""
    folder = place / "full"
    steps = ("--output_path=full", "--epochs=2", "--save_every=1")
    train(place, *steps, "--epochs=1")
    good = {path: path.read_bytes() for path in folder.rglob("*.ckpt")}
    limit = min(len(content) for content in good.values()) // 2
    process = start(place, *steps, "--resume=latest", preexec_fn=files_below(limit))
    errors = process.communicate(timeout=200)[1].splitlines()
    assert (
        process.returncode == 2
        and errors[-1].startswith("train_dreambooth.py: error: ")
        and "File too large" in errors[-1]
    )
    assert not any("Traceback" in line for line in errors)
    left = {path: path.read_bytes() for path in folder.rglob("*.ckpt")}
    assert left == good and not list(folder.rglob("*.part*"))
    train(place, *steps, "--resume=latest")
    assert (folder / "dreambooth_epoch_2.ckpt").exists()


def test_a_loss_that_is_not_finite_ends_with_what_to_try(place):
    """Its weights are never saved."""
    done = train(
        place, "--output_path=lost", "--start_learning_rate=1e30", "--epochs=20", "--save_every=1", status=2
    )
    last = done.stderr.splitlines()[-1]
    assert "lower start_learning_rate" in last and (
        "the last good state is lost/states/step_" in last or "no state was saved" in last
    )
    for path in (place / "lost").rglob("*.ckpt"):
        assert all(np.isfinite(values).all() for values in read_checkpoint(path).values())


def test_a_folder_that_vanishes_is_one_line(place):
    folder = place / "vanishing"
    process = start(
        place, "--output_path=vanishing", "--epochs=1000", "--ckpt_save_interval=1000", "--save_every=40"
    )
    wait_for(lambda: updates_done(folder) >= 1)
    os.rename(folder, place / "elsewhere")
    (place / "vanishing").write_text("a file in its place")
    errors = process.communicate(timeout=100)[1].splitlines()
    assert (
        process.returncode == 2
        and errors[-1].startswith("train_dreambooth.py: error: ")
        and "Traceback" not in "\n".join(errors)
    )


def test_the_smallest_training(place):
    """One picture, one update, a batch larger than the data set, pictures of another size, a prompt of 1,000
    words.
    """
    one = place / "one picture"
    one.mkdir()
    picture = next((place / "my dog").iterdir())
    (one / picture.name).write_bytes(picture.read_bytes())
    words = "--instance_prompt=a sks dog " + "on the hill " * 330
    smallest = (
        "--epochs=1",
        "--train_data_repeats=1",
        "--train_batch_size=8",
        "--image_size=64",
        "--class_data_dir=one class",
    )
    done = train(place, "--output_path=smallest", f"--instance_data_dir={one}", words, *smallest)
    assert (
        "step 1/1 epoch 1" in done.stderr
        and "the prompt has" in done.stderr
        and (place / "smallest/dreambooth_epoch_1.ckpt").exists()
    )


def test_folders_that_cannot_be_written_to(place):
    """/sys refuses new folders to the superuser, too."""
    for option in ("output_path", "class_data_dir"):
        errors = train(
            place, "--output_path=read only", f"--{option}=/sys/dreambooth", status=2
        ).stderr.splitlines()
        assert errors[-1].startswith("train_dreambooth.py: error: ") and "/sys/dreambooth" in errors[-1]
        assert not any("Traceback" in line for line in errors)


def test_a_poor_place_to_work_in(place):
    """No cache that can be written, which costs time and nothing else; no home, no locale, no terminal, a
    narrow screen; names with a line break, patterns and bytes that are no UTF-8.
    """
    output = place / "no\ncache [1]* {2} 100% caf\udce9"
    pictures = place / "[1] caf\udce9"
    shutil.copytree(place / "my dog", pictures)
    next(pictures.iterdir()).rename(pictures / "a\nb caf\udce9.png")
    poor = {"XDG_CACHE_HOME": "/sys/dreambooth", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    poor |= {"HOME": "", "COLUMNS": "40", "TERM": "dumb"}
    words = f"--output_path={output}", f"--instance_data_dir={pictures}", "--instance_prompt=a sks café"
    done = run(place, *train_arguments(), *words, "--epochs=1", **poor)
    assert (output / "dreambooth_epoch_1.ckpt").exists() and "Traceback" not in done.stderr
    assert "latents are not kept" in done.stderr and "compile cache not used" in done.stderr
    assert "caf\\udce9" in (output / "train.log").read_text()
    noted = json.loads((output / "effective_config.json").read_text())["options"]
    assert noted["instance_prompt"] == "a sks café" and noted["instance_data_dir"] == str(pictures)


def test_larger_pictures(place):
    """Of 128 pixels; `test_the_smallest_training` has 64, larger ones are tried by hand
    (docs/reliability.md).
    """
    large = (
        "--image_size=128",
        "--with_prior_preservation=False",
        "--train_batch_size=1",
        "--epochs=1",
        "--use_ema=False",
    )
    one = place / "one larger"
    one.mkdir()
    picture = next((place / "my dog").iterdir())
    (one / picture.name).write_bytes(picture.read_bytes())
    done = train(place, "--output_path=larger", f"--instance_data_dir={one}", *large)
    assert "step 1/1 epoch 1" in done.stderr and (place / "larger/dreambooth_epoch_1.ckpt").exists()


def test_only_the_newest_checkpoints_stay(place):
    """And a state at every checkpoint, of which one stays."""
    done = train(
        place,
        "--output_path=kept",
        "--epochs=4",
        "--keep_weights=2",
        "--save_state_minutes=0",
        "--warmup_steps=2",
    )
    assert sorted(path.name for path in (place / "kept").glob("*.ckpt")) == [
        "dreambooth_epoch_3.ckpt",
        "dreambooth_epoch_4.ckpt",
    ]
    assert "removed kept/dreambooth_epoch_2.ckpt (--keep_weights)" in done.stderr
    assert [path.name for path in (place / "kept/states").iterdir()] == ["step_00000010"]
    # the frozen VAE is taken from the checkpoint before, which is removed by now
    base, last = (
        read_checkpoint(place / "models/base.ckpt"),
        read_checkpoint(place / "kept/dreambooth_epoch_4.ckpt"),
    )
    assert list(base) == list(last)
    assert all(
        np.array_equal(base[name], last[name]) for name in base if name.startswith("first_stage_model.")
    )
    assert "warming up over the first 2 updates (the 2023 example ignored warmup_steps" in done.stderr
    check = subprocess.run(
        ["sha256sum", "--check", "checkpoints.sha256"], cwd=place / "kept", capture_output=True, text=True
    )
    assert check.returncode == 0 and check.stdout.count(": OK") == 2


def test_a_run_that_was_killed_before_its_first_state_begins_again(place):
    """And one that ended without a state is done; both by what its options, pictures and base model were."""
    steps = ("--output_path=killed", "--epochs=40", "--resume=latest")
    process = start(place, *steps)
    wait_for((place / "killed/dreambooth_epoch_2.ckpt").exists)
    process.kill(), process.communicate()
    (place / "killed/dreambooth_epoch_1.ckpt").write_bytes(b"a checkpoint that is written again")
    refused = train(place, *steps, "--seed=5", status=2).stderr
    assert "changed since the run began: seed 3407 -> 5; it has saved no state" in refused
    end = ("--output_path=killed", "--epochs=3", "--resume=latest")
    again = train(place, *end).stderr
    assert (
        "the run was stopped before it saved a state (--save_state_minutes): starting from the beginning"
        in again
    )
    train(place, "--output_path=not killed", "--epochs=3")
    for epoch in (1, 2, 3):
        name = f"dreambooth_epoch_{epoch}.ckpt"
        assert (place / "killed" / name).read_bytes() == (place / "not killed" / name).read_bytes()
    (place / "killed/dreambooth_epoch_3.ckpt").rename(place / "moved.ckpt")
    done = train(place, *end).stderr
    assert "updates are done. To train longer" in done and "compiling" not in done and "killed: " not in done
    longer = train(place, *end, "--epochs=5", status=2).stderr
    assert (
        "the run in killed ended after 8 updates and kept no state to continue from (--save_state_minutes=0 "
        "keeps one)" in longer
    )
