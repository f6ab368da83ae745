"""Images, TensorBoard and a report of a training while it goes on; and what a dry run says."""

import re
import signal

import numpy as np
import pytest
from commands import run, start, train, updates_done, wait_for
from conftest import ROOT, read_checkpoint
from PIL import Image

PROMPTS = ["--validation_prompt", "a sks dog", "a (dog:1.2)", "--validation_images=2"]
LOOKED_ON = [*PROMPTS, "--validation_every=2", "--report_to=tensorboard"]


def grids(folder) -> list[str]:
    return sorted(path.name for path in (folder / "validation").iterdir())


def same_weights(one, other) -> bool:
    first, second = read_checkpoint(one), read_checkpoint(other)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def drawn_alone(place, *arguments) -> np.ndarray:
    """The grid that text_to_image.py makes of the same prompts, seeds and settings."""
    (place / "validation.txt").write_text("a sks dog --seed 3407\na (dog:1.2) --seed 3407\n")
    run(
        place, "--config=model.yaml", "--data_path=validation.txt", "--ddim", "--steps=2", "--scale=7.5",
        "--n_samples=2", "--n_iter=1", "--batch_size=2", *arguments, script=ROOT / "text_to_image.py",
    )  # fmt: skip
    return np.asarray(Image.open(sorted(place.glob("alone*-grid-*.png"))[-1]))


@pytest.fixture(scope="module")
def plain(place):
    """A run that nobody looks on."""
    return train(place, "--output_path=plain", "--use_ema=True")


def test_looking_on_changes_no_bit(place, plain):
    done = train(place, "--output_path=seen", "--use_ema=True", *LOOKED_ON)
    assert grids(place / "seen") == [f"step_{update:06d}.png" for update in (0, 2, 4, 5)]
    for ending in ("", "_ema"):
        name = f"dreambooth_epoch_2{ending}.ckpt"
        assert same_weights(place / "seen" / name, place / "plain" / name)
    assert not (place / "plain/validation").exists()
    # what it drew is what the checkpoint draws, the averaged one
    last = np.asarray(Image.open(place / "seen/validation/step_000005.png"))
    alone = drawn_alone(
        place, "--ckpt_path=seen/dreambooth_epoch_2_ema.ckpt", "--output_path=alone_ema", "--n_rows=2"
    )
    assert last.shape == alone.shape and np.abs(last.astype(int) - alone).max() <= 1
    first = np.asarray(Image.open(place / "seen/validation/step_000000.png"))
    assert np.abs(first.astype(int) - last).max() > 1
    report = (place / "seen/report.html").read_text()
    for text in ("complete: 5 updates", "base model", "a sks dog", "dreambooth_epoch_2_ema.ckpt --prompt"):
        assert text in report, text
    assert "report.html" in done.stderr and (place / "plain/report.html").exists()
    values = board(place / "seen/tensorboard")
    assert values["loss/all"] == [1, 2, 3, 4, 5] and values["validation"] == [0, 2, 4, 5]
    assert {"training/gradient_norm", "speed/memory_gb", "loss/class"} <= values.keys()


def board(folder) -> dict[str, list[int]]:
    """The updates that TensorBoard's files have, by tag."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[int]] = {}
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_a_run_that_was_stopped_draws_the_rest(place, plain):
    arguments = ["--output_path=stopped", "--use_ema=True", *PROMPTS, "--validation_every=1", "--epochs=2"]
    process = start(place, *arguments)
    wait_for(lambda: updates_done(place / "stopped") >= 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    done = updates_done(place / "stopped")
    assert process.returncode == 130 and 2 <= done < 5
    assert f"stopped after update {done} of 5" in (place / "stopped/report.html").read_text()
    assert f"step_{done:06d}.png" not in grids(place / "stopped")  # who stops does not wait for it
    train(place, *arguments, "--resume=latest")
    # those that the signal came into were given up
    left_out = {int(update) for update in re.findall(r"images of update (\d+): the run stops", said)}
    assert len(left_out) <= 1 and done not in left_out
    wanted = [f"step_{update:06d}.png" for update in range(6) if update not in left_out]
    assert grids(place / "stopped") == wanted
    assert same_weights(place / "stopped/dreambooth_epoch_2.ckpt", place / "plain/dreambooth_epoch_2.ckpt")


def test_a_lora_with_a_frozen_text_encoder_is_looked_on(place):
    """The VAE is brought back from the disk, the text encoder has answered before it left."""
    lora = ["--use_lora=True", "--train_text_encoder=False", "--lora_fp16=False"]
    train(place, "--output_path=lora", *lora, *PROMPTS)
    assert grids(place / "lora") == [f"step_{update:06d}.png" for update in (0, 3, 5)]
    last = np.asarray(Image.open(place / "lora/validation/step_000005.png"))
    file = "--lora_ckpt_path=lora/dreambooth_lora_epoch_2.safetensors"
    alone = drawn_alone(place, "--ckpt_path=models/base.ckpt", file, "--output_path=alone_lora", "--n_rows=2")
    assert np.abs(last.astype(int) - alone).max() <= 1
    text = (place / "lora/report.html").read_text()
    assert "LoRA of rank 4" in text and "merge_lora.py models/base.ckpt" in text


def test_a_dry_run_says_what_would_be_and_leaves_nothing(place):
    before = sorted(place.rglob("*"))
    done = train(place, "--output_path=never", "--class_data_dir=none_yet", "--dry_run", *PROMPTS)
    lines = dict(re.findall(r"^  ([a-z ]+?)  +(.*)$", done.stdout, re.MULTILINE))
    assert done.stdout.startswith("dry run: nothing was trained, generated or written\n")
    assert lines["images"].startswith("5 of 'a sks dog' in my dog, all readable; each 1 times per epoch")
    assert lines["class images"] == "3 of 'a dog' in none_yet: 0 there, 3 to be generated"
    assert lines["updates"].startswith("5 to come, of 2 images of subjects and as many of classes; 2 epochs")
    assert re.fullmatch(r"about \d\.\d GB, the machine has [\d.]+ GB", lines["memory"])
    assert re.match(r"class images about .+, training about .+ on 2 CPU cores", lines["time"])
    assert [path for path in sorted(place.rglob("*")) if "cache" not in path.parts] == [
        path for path in before if "cache" not in path.parts
    ]
    assert "no images found" in train(place, "--dry_run", "--instance_data_dir=models", status=2).stderr


def test_mistakes_are_refused(place):
    for flags, wanted in {
        ("--validation_every=5",): "validation_every acts with --validation_prompt only",
        ("--validation_prompt", "(a:1.2.3)"): "the weight 1.2.3 is no number",
    }.items():
        assert wanted in train(place, *flags, status=2).stderr
