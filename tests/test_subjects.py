"""Images of subjects with prompts and masks, as a training takes them."""

import dataclasses

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image
from trainings import OPTIONS

from ldm.image_files import list_images, mask_of
from ldm.subjects import load_subjects, with_prompts
from ldm.training.samples import DreamBoothSamples


@pytest.fixture
def options(tmp_path):
    paths = write_pictures(tmp_path / "instance", 3)
    Image.new("L", Image.open(paths[0]).size, 128).save(paths[0].with_suffix(".mask.png"))
    transparent = Image.open(paths[1]).convert("RGBA")
    alpha = np.zeros(transparent.size[::-1], np.uint8)
    alpha[:, : alpha.shape[1] // 2] = 255
    transparent.putalpha(Image.fromarray(alpha))
    transparent.save(paths[1])
    return dataclasses.replace(
        OPTIONS, instance_data_dir=str(tmp_path / "instance"), class_data_dir=str(tmp_path / "class"),
        random_crop=False,
    )  # fmt: skip


def test_a_mask_is_no_image(options, tmp_path):
    assert len(list_images(tmp_path / "instance")) == 3
    lonely = write_pictures(tmp_path / "lonely", 1)[0]
    lonely.rename(lonely.with_name("a.mask.png"))
    assert len(list_images(tmp_path / "lonely")) == 1  # of nothing: an image of that name


def test_masks_are_found_and_weigh_the_loss(options):
    (subject,) = load_subjects(options)
    assert not any(picture.has_mask for picture in subject.pictures)
    options = dataclasses.replace(options, masked_loss=True)
    (subject,) = load_subjects(options)
    assert [picture.has_mask for picture in subject.pictures] == [True, True, False]
    samples = DreamBoothSamples.of(options, [subject], [])
    masks = {sample.path: samples.mask(sample, 4) for sample in samples.pick(0, samples.samples_per_epoch)}
    half, left, none = (masks[picture.path] for picture in subject.pictures)
    assert all(mask.shape == (1, 4, 4) and abs(mask.mean() - 1) < 1e-6 for mask in masks.values())
    assert (half == 1).all() and (none == 1).all()  # grey all over weighs as white does
    assert np.allclose(left[0, :, :2], 2, atol=0.1) and np.allclose(left[0, :, 2:], 0, atol=0.1)
    flipped = DreamBoothSamples.of(dataclasses.replace(options, random_flip=True), [subject], [])
    seen = {flipped.mask(sample, 4)[0, 0, 0] > 1 for sample in flipped.pick(0, 120)
            if sample.path == subject.pictures[1].path}  # fmt: skip
    assert seen == {True, False}


def test_a_mask_may_be_white_on_nothing(options):
    """As programs export a selection."""
    (subject,) = load_subjects(options)
    path = subject.pictures[0].path
    alpha = np.zeros((*Image.open(path).size[::-1], 4), np.uint8)
    alpha[:8] = 255
    Image.fromarray(alpha).save(path.with_suffix(".mask.png"))
    mask = np.asarray(mask_of(path))
    assert (mask[:8] == 255).all() and not mask[8:].any()


def test_masks_that_cannot_be_used(options, tmp_path):
    options = dataclasses.replace(options, masked_loss=True)
    (subject,) = load_subjects(options)
    path = subject.pictures[0].path
    Image.new("L", Image.open(path).size, 0).save(path.with_suffix(".mask.png"))
    with pytest.raises(ValueError, match="its mask is empty: nothing would be learned"):
        load_subjects(options)
    Image.new("L", (100, 20), 255).save(path.with_suffix(".mask.png"))
    with pytest.raises(ValueError, match="must have the shape of its image"):
        load_subjects(options)
    path.with_suffix(".mask.png").unlink(), subject.pictures[1].path.unlink()
    with pytest.raises(
        ValueError, match="masked_loss: none of 2 images is transparent or has a NAME.mask.png"
    ):
        load_subjects(options)
    assert mask_of(path) is None


def test_a_padded_image_is_seen_whole_and_its_edges_do_not_count(options, tmp_path):
    (tmp_path / "wide").mkdir()
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3))).save(
        tmp_path / "wide/a.png"
    )
    options = dataclasses.replace(
        options, instance_data_dir=str(tmp_path / "wide"), image_fit="pad", masked_loss=True, random_crop=True
    )
    subjects = load_subjects(options)
    samples = DreamBoothSamples.of(options, subjects, [])
    (sample,) = samples.pick(0, 1)
    square = samples.square(samples.crop(sample))
    assert square.shape == (32, 32, 3) and square[16, 0, 0] < 3 and square[16, -1, 0] > 60
    assert (square[:8] == square[8]).all() and (square[24:] == square[23]).all()
    mask = samples.mask(sample, 4)[0]
    assert (mask[[0, 3]] == 0).all() and (mask[1:3] == 2).all()
    assert len(samples.crops(100)) == (2 if options.random_flip else 1)


def test_captions_of_instance_and_class_images(options, tmp_path):
    classes = write_pictures(tmp_path / "class", 2, seed=1)
    (tmp_path / "instance/picture_0.txt").write_text("[prompt] asleep")
    classes[1].with_suffix(".txt").write_text("[prompt] in the rain")
    options = dataclasses.replace(options, captions="text_files")
    (subject,) = load_subjects(options)
    (of_class,) = with_prompts(options, [classes])
    assert [picture.prompt for picture in subject.pictures] == ["a photo of sks dog asleep", *[
        "a photo of sks dog"] * 2]  # fmt: skip
    assert [picture.prompt for picture in of_class] == ["a photo of a dog", "a photo of a dog in the rain"]
    samples = DreamBoothSamples.of(options, [subject], [of_class])
    prompts = [
        "a photo of sks dog asleep",
        "a photo of sks dog",
        "a photo of a dog",
        "a photo of a dog in the rain",
    ]
    assert samples.prompts() == prompts
    assert {sample.prompt for sample in samples.pick(0, 60)} == set(prompts)
