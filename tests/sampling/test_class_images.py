"""Class images: those that are there count, the missing ones are generated, each from its own number."""

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import ROOT, write_pictures

from ldm.files import folder_to_itself
from ldm.image_files import NOTE
from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.sampling.class_images import ClassImages, generate_class_images, valid_images
from ldm.sampling.text_to_image import Sampling
from ldm.values import ConfigError

SETTINGS = Sampling("ddim", steps=2, guidance_scale=2.0, height=32, width=32)
PROMPT, OPTIONS = "a dog", TrainOptions(seed=1, sample_batch_size=2)


def no_bar(total):
    return nullcontext(SimpleNamespace(update=lambda: None))


def complete(pipeline, images, ranks=ALONE):
    def generate(numbers):
        return generate_class_images(pipeline, images, PROMPT, OPTIONS, SETTINGS, numbers)

    return images.complete(generate, ranks, no_bar)


def test_they_are_topped_up_to_the_count(pipeline, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole, parts = ClassImages(tmp_path / "whole", 5), ClassImages(tmp_path / "parts", 5)
    paths = complete(pipeline, whole)
    assert (
        [path.name for path in paths]
        == [f"class_{n:05d}.png" for n in range(5)]
        == sorted(p.name for p in whole.folder.iterdir())
    )
    assert "class images: 0 found, generating 5 of 5" in caplog.text
    (own,) = write_pictures(parts.folder, 1)  # an image of the user's own
    interrupted = generate_class_images(pipeline, parts, PROMPT, OPTIONS, SETTINGS, parts.missing())
    next(interrupted), next(interrupted), next(interrupted)
    interrupted.close()
    assert len(valid_images(parts.folder)) == 4 and parts.missing() == [3]
    assert complete(pipeline, parts) == [*(parts.path(n) for n in range(4)), own]
    for path in paths[:4]:
        assert path.read_bytes() == (parts.folder / path.name).read_bytes()
    # of more, the first
    assert complete(pipeline, ClassImages(parts.folder, 2)) == [
        parts.path(0),
        parts.path(1),
    ]
    assert "class images: 5 found, the first 2 by name are used (--num_class_images)" in caplog.text


def test_processes_generate_what_one_would(pipeline, tmp_path, monkeypatch):
    """The first one waits for the second at the end, which shares its folder; or does not, and that is an
    error.
    """
    one = complete(pipeline, ClassImages(tmp_path / "one", 3))
    folder, waits = tmp_path / "two", []

    def wait(self):
        waits.append(self)
        if len(waits) == 2 and shares:
            images = ClassImages(folder, 3)
            list(generate_class_images(pipeline, images, PROMPT, OPTIONS, SETTINGS, [1]))

    monkeypatch.setattr(Ranks, "wait", wait)
    monkeypatch.setattr(Ranks, "any", lambda _, flag: flag)
    for shares in (False, True):
        waits.clear()
        if shares:
            assert [
                path.read_bytes() for path in complete(pipeline, ClassImages(folder, 3), Ranks(0, 2))
            ] == [path.read_bytes() for path in one]
        else:
            with pytest.raises(ValueError, match="must be a folder that all processes share"):
                complete(pipeline, ClassImages(tmp_path / "own", 3), Ranks(0, 2))


def test_damaged_ones_do_not_count(tmp_path, caplog):
    good = write_pictures(tmp_path, 2)
    (tmp_path / "bad.png").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert valid_images(tmp_path) == good
    assert "bad.png" in caplog.text


DOG, CAR = ({"class_prompt": prompt, "base model": "1", "checkpoint": "a.ckpt"} for prompt in ("dog", "car"))


def test_what_they_were_drawn_from_is_noted_and_compared(pipeline, tmp_path, caplog):
    folder = tmp_path / "dogs"
    drawn = complete(pipeline, ClassImages(folder, 1, DOG))
    assert json.loads((folder / NOTE).read_text()) == DOG
    with caplog.at_level(logging.INFO):
        assert complete(pipeline, ClassImages(folder, 1, DOG)) == drawn
    assert "left out" not in caplog.text  # the note is nothing that a user has put there
    other_model = DOG | {"base model": "2", "checkpoint": "b.ckpt"}
    for origin, words in ((CAR, "class_prompt 'dog', not 'car'"), (other_model, "a.ckpt, not b.ckpt")):
        with pytest.raises(ConfigError, match=f"{words}: give a new folder, or --accept_class_images"):
            complete(pipeline, ClassImages(folder, 1, origin))
        assert complete(pipeline, ClassImages(folder, 1, origin, takes_all=True)) == drawn
    # own images without a note, and with one that is of images which are gone, are taken as they are
    drawn[0].unlink()
    own = write_pictures(folder, 1)
    assert complete(pipeline, ClassImages(folder, 1, CAR)) == own
    complete(pipeline, ClassImages(folder, 2, CAR))
    assert json.loads((folder / NOTE).read_text()) == CAR


def test_none_are_drawn_beside_sub_folders_that_hold_some(pipeline, tmp_path):
    write_pictures(tmp_path / "40_dog", 2)
    images = ClassImages(tmp_path, 1, DOG)
    with pytest.raises(ConfigError, match="0 images found, 1 are missing; .* 2 in .*40_dog.*=40.*accept_cl"):
        complete(pipeline, images)
    assert [path.name for path in tmp_path.iterdir()] == ["40_dog"]
    write_pictures(tmp_path, 1)
    assert len(complete(pipeline, images)) == 1  # nothing is missing
    assert len(complete(pipeline, ClassImages(tmp_path, 2, DOG, takes_all=True))) == 2


def test_of_two_runs_the_second_waits_and_takes_what_is_there(pipeline, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = ClassImages(tmp_path, 2), ClassImages(tmp_path, 2)
    numbers = first.missing()
    with ThreadPoolExecutor(1) as other:
        with folder_to_itself(tmp_path, "busy"):
            ended = other.submit(complete, None, second)  # it has no pipeline: it must not draw
            while "another run generates class images there; waiting" not in caplog.text:
                time.sleep(0.01)
            drawn = list(generate_class_images(pipeline, first, PROMPT, OPTIONS, SETTINGS, numbers))
        assert ended.result(10) == drawn


def test_of_two_runs_without_locks_the_faster_ones_image_is_taken(pipeline, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    images = ClassImages(tmp_path, 2)
    numbers = images.missing()
    write_pictures(tmp_path, 1)[0].rename(images.path(1))
    before = images.path(1).read_bytes()
    list(generate_class_images(pipeline, images, PROMPT, OPTIONS, SETTINGS, numbers))
    assert images.path(1).read_bytes() == before and images.path(0).exists()
    assert "class_00001.png: another run was faster, its image is taken" in caplog.text


def test_a_lock_goes_with_its_process(tmp_path):
    """A process that is killed while another waits for it."""
    code = "import sys, time; from ldm.files import folder_to_itself\n"
    code += "with folder_to_itself(sys.argv[1], ''): print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()
    with ThreadPoolExecutor(1) as waiting:
        ended = waiting.submit(lambda: folder_to_itself(tmp_path, "busy").__enter__())
        with pytest.raises(TimeoutError):
            ended.result(0.2)
        other.kill()
        ended.result(10)
    other.wait()
