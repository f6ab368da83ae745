"""Class images: those that are there count, the missing ones are generated, each from its own number."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import write_pictures

from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.sampling.class_images import ClassImages, generate_class_images, valid_images
from ldm.sampling.text_to_image import Sampling

SETTINGS = Sampling("ddim", steps=2, guidance_scale=2.0, height=32, width=32)
OPTIONS = TrainOptions(class_prompt="a dog", seed=1, sample_batch_size=2)


def no_bar(total):
    return nullcontext(SimpleNamespace(update=lambda: None))


def complete(pipeline, images, ranks=ALONE):
    def generate(numbers):
        return generate_class_images(pipeline, images, numbers, OPTIONS, SETTINGS)

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
    interrupted = generate_class_images(pipeline, parts, parts.missing(), OPTIONS, SETTINGS)
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
    assert "class images: 5 found, the first 2 by name are used" in caplog.text


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
            list(generate_class_images(pipeline, images, [1], OPTIONS, SETTINGS))

    monkeypatch.setattr(Ranks, "wait", wait)
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
