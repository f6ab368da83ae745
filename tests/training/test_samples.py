import hashlib
from collections import Counter

import numpy as np
import pytest
from conftest import write_pictures
from trainings import pictures, samples_of

from ldm.subjects import Subject, load_instance_images
from ldm.training.samples import Cropping, DreamBoothSamples, Noising


@pytest.fixture
def folders(tmp_path):
    return write_pictures(tmp_path / "instance", 3), write_pictures(tmp_path / "class", 5, seed=1)


def make(folders, seed=0, random_crop=False, with_class=True, random_flip=False):
    cropping = Cropping(32, random_crop, random_flip)
    return samples_of(folders[0], folders[1] if with_class else [], 4, cropping, seed)


def test_an_epoch_takes_each_instance_picture_equally_often(folders):
    samples = make(folders)
    assert samples.samples_per_epoch == 12
    epochs = [[sample.path for sample in samples.pick(12 * e, 12)[:12]] for e in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == {path: 4 for path in folders[0]}
    assert epochs[0] != epochs[1] != epochs[2]


def test_each_instance_draw_has_a_class_draw_and_class_pictures_take_turns(folders):
    picked = make(folders).pick(0, 10)
    assert len(picked) == 20 and [d.number for d in picked] == [*range(10), *range(10)]
    assert Counter(d.path for d in picked[10:]) == {path: 2 for path in folders[1]}
    assert len(make(folders, with_class=False).pick(0, 10)) == 10


def test_samples_do_not_depend_on_how_the_run_is_split(folders):
    whole = make(folders, random_crop=True)
    parts = make(folders, random_crop=True)
    long = [picked for picked in whole.batches(2, 20)]
    assert long == [*parts.batches(2, 7), *parts.batches(2, 13, start=7)]
    for sample in long[11]:
        assert np.array_equal(whole.pixels(sample), parts.pixels(sample))
        for a, b in zip(whole.noise(sample, (4, 4, 4)), parts.noise(sample, (4, 4, 4))):
            assert np.array_equal(a, b)


def test_random_numbers_differ_between_samples_purposes_and_seeds(folders):
    samples, other = make(folders), make(folders, seed=1)
    picked = samples.pick(0, 4)
    noises = [samples.noise(sample, (4, 8, 8))[1] for sample in picked] + [
        other.noise(picked[0], (4, 8, 8))[1]
    ]
    noises += [samples.noise(picked[0], (4, 8, 8))[2]]
    flat = np.stack([noise.ravel() for noise in noises])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.3 and abs(flat.mean()) < 0.1 and abs(flat.std() - 1) < 0.1
    steps = [samples.noise(sample, (1,))[0] for sample in samples.pick(0, 500)]
    assert min(steps) < 20 and max(steps) > 980 and abs(np.mean(steps) - 499.5) < 40


def test_a_repeat_has_one_crop_in_all_epochs_and_a_class_picture_one_for_ever(folders):
    samples = make(folders, random_crop=True)
    epochs = [samples.pick(12 * epoch, 12) for epoch in range(3)]
    instance = [
        {(sample.path, sample.crop_number): samples.crop(sample) for sample in picked[:12]}
        for picked in epochs
    ]
    assert instance[0] == instance[1] == instance[2] and len(instance[0]) == 12
    assert {sample.crop_number for sample in epochs[0][:12]} == set(range(12))  # picture * repeats + repeat
    assert all(folders[0].index(path) == number // 4 for path, number in instance[0])
    assert len(set(instance[0].values())) > 3  # repeats of a picture differ
    classes = {samples.crop(sample) for picked in epochs for sample in picked[12:]}
    assert len(classes) == 5
    assert (
        {crop for crops in instance for crop in crops.values()} | classes
        == set(samples.crops(36))
        == set(samples.crops(12))
    )
    other = make(folders, seed=1, random_crop=True)
    assert {other.crop(sample) for sample in other.pick(0, 12)[:12]} != set(instance[0].values())


def test_crops_are_those_that_a_run_draws(tmp_path, folders):
    assert len(make(folders).crops(12)) == 3 + 5  # at the centre: one a picture
    assert len(make(folders).crops(2)) <= 4
    square = write_pictures(tmp_path / "square", 2, size=(40, 40)), []
    assert [crop[1:] for crop in make(square, random_crop=True).crops(8)] == [(0, 0, False)] * 2
    samples = make(folders, random_crop=True)
    before = [samples.pixels(sample) for sample in samples.pick(0, 3)]
    samples.forget_images()
    assert all(np.array_equal(a, samples.pixels(sample)) for a, sample in zip(before, samples.pick(0, 3)))


@pytest.mark.parametrize("random_crop", [False, True])
def test_half_of_the_crops_are_flipped_and_the_other_half_in_the_next_epoch(tmp_path, folders, random_crop):
    """Instance pictures by repeat, class pictures by round; corners are those of a run without flips."""
    folders = folders[0], write_pictures(tmp_path / "classes", 40, seed=2)
    samples, plain = (
        make(folders, random_crop=random_crop, random_flip=True),
        make(folders, random_crop=random_crop),
    )
    picked = samples.pick(0, 240)  # 20 epochs of 12, 6 rounds of 40
    for part, turns in ((picked[:240], 20), (picked[240:], 6)):
        seen = {}
        for sample in part:
            crop, without = samples.crop(sample), plain.crop(sample)
            assert crop[:3] == without[:3] and not without[3]
            seen.setdefault((sample.path, sample.crop_number), []).append((sample.turn, crop[3]))
            pixels = plain.pixels(sample)
            assert np.array_equal(samples.pixels(sample), pixels[:, :, ::-1] if crop[3] else pixels)
        for flips in seen.values():
            assert [turn for turn, _ in flips] == list(range(turns))
            # the other way in every second turn
            assert all(flip == (flips[0][1] ^ (turn % 2 == 1)) for turn, flip in flips)
        first = [flips[0][1] for flips in seen.values()]
        assert 0.2 < np.mean(first) < 0.8 and len(set(first)) == 2
    assert set(samples.crops(240)) == {samples.crop(sample) for sample in picked}
    assert [make(folders, random_crop=random_crop, random_flip=True).crop(sample) for sample in picked] == [
        samples.crop(sample) for sample in picked
    ]
    other = make(folders, seed=1, random_crop=random_crop, random_flip=True)
    assert [other.crop(sample)[3] for sample in other.pick(0, 12)] != [
        samples.crop(sample)[3] for sample in picked[:12]
    ]


def test_pixels(folders):
    samples = make(folders)
    pixels = samples.pixels(samples.pick(0, 1)[0])
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32 and np.abs(pixels).max() <= 1


def test_instance_folder_errors_and_nothing_written(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images found"):
        load_instance_images(tmp_path / "empty")
    paths = write_pictures(tmp_path / "instance", 2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "instance").iterdir()}
    assert load_instance_images(tmp_path / "instance") == paths
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "instance").iterdir()} == before
    (tmp_path / "instance/bad.jpg").write_text("hello")
    with pytest.raises(ValueError, match="bad.jpg"):
        load_instance_images(tmp_path / "instance")


def of_two(folders, classes=2, **noising):
    """Two subjects of 3 and 5 images, of two classes or one."""
    first, second = (pictures(paths, f"a sks {n}") for n, paths in enumerate(folders))
    of_class = [pictures(paths[: 3 + n], f"a {n}") for n, paths in enumerate((folders[1], folders[0]))]
    subjects = [Subject(first, 4, 0), Subject(second, 2, classes - 1)]
    return DreamBoothSamples(subjects, of_class[:classes], Cropping(32, True), 0, Noising(**noising))


def test_subjects_take_turns_in_proportion(folders):
    samples = of_two(folders)
    assert samples.samples_per_epoch == 12 + 10
    for epoch in range(3):
        picked = samples.pick(22 * epoch, 22)
        assert Counter(sample.prompt for sample in picked) == {
            "a sks 0": 12,
            "a sks 1": 10,
            "a 0": 12,
            "a 1": 10,
        }
        assert Counter(sample.path for sample in picked[:22]) == {
            **{path: 4 for path in folders[0]}, **{path: 2 for path in folders[1]}
        }  # fmt: skip
        for first in range(0, 22, 4):  # every batch, as evenly as whole numbers can
            ours = sum(sample.prompt == "a sks 0" for sample in picked[first : first + 4])
            assert 1 <= ours <= 3
        for one, its_class in zip(picked[:22], picked[22:]):
            assert one.prompt.removeprefix("a sks") == its_class.prompt.removeprefix("a")
    assert len({(sample.crop_purpose, sample.crop_number) for sample in samples.pick(0, 22)}) == 22 + 3 + 3
    assert samples.pick(0, 50)[:10] == [*samples.pick(0, 7)[:7], *samples.pick(7, 3)[:3]]


def test_a_class_of_two_subjects_is_one_sequence(folders):
    samples = of_two(folders, classes=1)
    turns = [sample.path for sample in samples.pick(0, 30)[30:]]
    assert all(Counter(turns[first : first + 3]) == Counter(folders[1][:3]) for first in range(0, 30, 3))
    assert samples.prompts() == ["a sks 0", "a sks 1", "a 0"]
    assert {samples.crop(sample) for sample in samples.pick(0, 66)} == set(samples.crops(66))


def test_the_first_subject_of_several_has_the_order_that_it_has_alone(folders):
    together, alone = of_two(folders), make(folders)
    own = [sample.path for sample in together.pick(0, 22)[:22] if sample.prompt == "a sks 0"]
    assert own == [sample.path for sample in alone.pick(0, 12)[:12]]


def test_what_is_drawn_follows_the_settings(folders):
    plain = of_two(folders)
    changed = of_two(folders, first=200, end=300, offset=0.5, caption_dropout=0.3)
    picked, others = changed.pick(0, 400), plain.pick(0, 400)
    dropped = [not sample.prompt for sample in picked]
    assert 0.25 < np.mean(dropped[:400]) < 0.35 and 0.25 < np.mean(dropped[400:]) < 0.35
    assert dropped[:400] != dropped[400:] and "" in changed.prompts() and "" not in plain.prompts()
    assert changed.pick(7, 1)[0] == picked[7]
    offsets = []
    for sample, other in zip(picked[:200], others):
        t, noise, posterior = changed.noise(sample, (4, 8, 8))
        t0, noise0, posterior0 = plain.noise(other, (4, 8, 8))
        assert 200 <= t < 300 and np.array_equal(posterior, posterior0)
        if t == t0:
            continue
        offset = noise - noise0
        assert noise.dtype == np.float32 and np.abs(offset - offset[:, :1, :1]).max() < 1e-6
        offsets.append(offset[:, 0, 0])
    assert abs(np.std(offsets) - 0.5) < 0.05 and abs(np.mean(offsets)) < 0.06


def test_samples_of_one_subject_are_those_of_before_there_could_be_several(folders):
    """The digest is of samples before concepts, captions, recipes: order, crops, flips, t and noise."""
    samples, digest = make(folders, seed=7, random_crop=True, random_flip=True), hashlib.sha256()
    for sample in samples.pick(5, 40):
        t, noise, posterior_noise = samples.noise(sample, (4, 8, 8))
        facts = (
            sample.path.name, sample.number, sample.crop_purpose, sample.crop_number, sample.noise_purpose,
            sample.turn, samples.crop(sample)[1:], t,
        )  # fmt: skip
        digest.update(repr(facts).encode() + noise.tobytes() + posterior_noise.tobytes())
    assert digest.hexdigest() == "35be2c3ebc8f5b6c68e6caf7a88840c77ed21e6fa78ec53d29d874571d620367"
