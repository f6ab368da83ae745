"""Several subjects, captions, a word's embedding: from the command line to the image."""

import json

import numpy as np
import pytest
from commands import run, train_arguments
from conftest import ROOT, read_checkpoint, write_pictures
from PIL import Image
from safetensors.numpy import load_file

from ldm.run.states import read_state
from ldm.weights.embeddings import ROW, TABLE

TWO = ("--concepts=two.json", "--captions=text_files", "--train_token=sks", "--token_learning_rate=1e-2",
       "--train_data_repeats=2", "--text_encoder_stop=0.5")  # fmt: skip
TOKEN = 48136  # sks


@pytest.fixture(scope="module")
def two(place):
    """Two subjects of one class, trained to the end, and what the command said."""
    write_pictures(place / "my other dog", 3, seed=5)
    (place / "my dog/picture_0.txt").write_text("[prompt] asleep")
    subjects = [
        {"instance_data_dir": folder, "instance_prompt": prompt, "class_data_dir": "classes/both",
         "class_prompt": "a dog"}
        for folder, prompt in (("my dog", "a sks dog"), ("my other dog", "a ohwx dog"))
    ]  # fmt: skip
    (place / "two.json").write_text(json.dumps(subjects))
    return run(place, *train_arguments(), *TWO, "--output_path=two", "--save_every=2").stderr


def test_two_subjects_of_a_class(place, two):
    images = len(list((place / "my dog").glob("*.png")))
    assert (
        f"training 0.2M values on {images + 3} images of 2 subjects ({images}, 3)" in two
        or "of 2 subjects" in two
    )
    assert two.count("class images: 0 found, generating 3 of 3") == 1
    assert len(list((place / "classes/both").glob("*.png"))) == 3
    assert "1 of" in two and "images have a caption, the others take the prompt 'a sks dog'" in two
    assert two.count("the text encoder is frozen from here on") == 1
    noted = json.loads((place / "two/run.json").read_text())["origin"]
    assert [its["instance_prompt"] for its in noted["concepts"]] == ["a sks dog", "a ohwx dog"]
    assert noted["captions"] == "text_files" and {"instance captions", "class captions"} <= noted.keys()


def test_one_row_of_the_table_is_trained_and_saved_apart(place, two):
    base = read_checkpoint(place / "models/base.ckpt")
    tuned = read_checkpoint(place / "two/dreambooth_epoch_2.ckpt")
    changed = np.flatnonzero((tuned[TABLE] != base[TABLE]).any(1))
    assert list(changed) == [TOKEN] and tuned.keys() == base.keys()
    (name, row), *more = load_file(place / "two/dreambooth_embedding_epoch_2.safetensors").items()
    assert name == "<sks>" and not more and np.array_equal(row, tuned[TABLE][TOKEN : TOKEN + 1])
    (state,) = (place / "two/states").iterdir()
    arrays = read_state(state).arrays()
    assert ROW in arrays and TABLE not in arrays
    run(place, str(state), "models/base.ckpt", "again.ckpt", script=ROOT / "scripts/weights_of_state.py")
    again = read_checkpoint(place / "again.ckpt")
    assert np.array_equal(again[TABLE][TOKEN], arrays[ROW][0]) and again.keys() == base.keys()


def test_a_change_of_the_captions_is_noticed(place, two):
    (place / "my dog/picture_0.txt").write_text("[prompt] awake")
    said = run(place, *train_arguments(), *TWO, "--output_path=two", "--resume=latest", status=2).stderr
    assert "instance captions" in said
    (place / "my dog/picture_0.txt").write_text("[prompt] asleep")
    assert (
        "nothing to do" in run(place, *train_arguments(), *TWO, "--output_path=two", "--resume=latest").stderr
    )


def draw(place, folder, *extra, status=0):
    done = run(
        place, "--config=model.yaml", "--n_samples=1", "--n_iter=1", "--sampling_steps=2", "--ddim",
        "--prompt=a sks dog", "--ckpt_path=models/base.ckpt", f"--output_path={folder}", *extra,
        script=ROOT / "text_to_image.py", status=status,
    )  # fmt: skip
    return done.stderr if status else np.asarray(Image.open(place / folder / "samples/00000.png")).astype(int)


def test_an_embedding_is_drawn_with(place, two):
    embedding = "--embedding_path=two/dreambooth_embedding_epoch_2.safetensors"
    plain, with_it = draw(place, "plain"), draw(place, "with", embedding)
    other = draw(place, "other", embedding, "--prompt=a dog")
    assert np.abs(plain - with_it).max() > 0
    assert np.array_equal(other, draw(place, "other plain", "--prompt=a dog"))
    said = draw(place, "refused", "--embedding_path=models/base.ckpt", status=2)
    assert "must hold one embedding of" in said
    assert "embedding_path gone.safetensors: no such file" in draw(
        place, "refused", "--embedding_path=gone.safetensors", status=2
    )
