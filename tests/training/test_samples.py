from collections import Counter

import numpy as np
import pytest
from conftest import write_pictures

from ldm.training.samples import DreamBoothData, load_instance_images


@pytest.fixture
def folders(tmp_path):
    return write_pictures(tmp_path / "instance", 3), write_pictures(tmp_path / "class", 5, seed=1)


def make(folders, seed=0, random_crop=False, with_class=True, random_flip=False):
    return DreamBoothData(folders[0], folders[1] if with_class else [], 4, 32, random_crop, seed, random_flip)


def test_an_epoch_draws_each_instance_picture_equally_often(folders):
    data = make(folders)
    assert data.samples_per_epoch == 12
    epochs = [[draw.path for draw in data.draws(12 * e, 12)[:12]] for e in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == {path: 4 for path in folders[0]}
    assert epochs[0] != epochs[1] != epochs[2]


def test_each_instance_draw_has_a_class_draw_and_class_pictures_take_turns(folders):
    draws = make(folders).draws(0, 10)
    assert len(draws) == 20 and [d.sample for d in draws] == [*range(10), *range(10)]
    assert Counter(d.path for d in draws[10:]) == {path: 2 for path in folders[1]}
    assert len(make(folders, with_class=False).draws(0, 10)) == 10


def test_samples_do_not_depend_on_how_the_run_is_split(folders):
    whole = make(folders, random_crop=True)
    parts = make(folders, random_crop=True)
    long = [draws for draws in whole.batches(2, 20)]
    assert long == [*parts.batches(2, 7), *parts.batches(2, 13, start=7)]
    for draw in long[11]:
        assert np.array_equal(whole.pixels(draw), parts.pixels(draw))
        for a, b in zip(whole.noise(draw, (4, 4, 4), 1000), parts.noise(draw, (4, 4, 4), 1000)):
            assert np.array_equal(a, b)


def test_random_numbers_differ_between_samples_purposes_and_seeds(folders):
    data, other = make(folders), make(folders, seed=1)
    draws = data.draws(0, 4)
    noises = [data.noise(draw, (4, 8, 8), 1000)[1] for draw in draws] + [other.noise(draws[0], (4, 8, 8), 1000)[1]]
    noises += [data.noise(draws[0], (4, 8, 8), 1000)[2]]
    flat = np.stack([noise.ravel() for noise in noises])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.3 and abs(flat.mean()) < 0.1 and abs(flat.std() - 1) < 0.1
    steps = [data.noise(draw, (1,), 1000)[0] for draw in data.draws(0, 500)]
    assert min(steps) < 20 and max(steps) > 980 and abs(np.mean(steps) - 499.5) < 40


def test_a_repeat_has_one_crop_in_all_epochs_and_a_class_picture_one_for_ever(folders):
    data = make(folders, random_crop=True)
    epochs = [data.draws(12 * epoch, 12) for epoch in range(3)]
    instance = [{(draw.path, draw.crop_number): data.crop(draw) for draw in draws[:12]} for draws in epochs]
    assert instance[0] == instance[1] == instance[2] and len(instance[0]) == 12
    assert {draw.crop_number for draw in epochs[0][:12]} == set(range(12))  # picture * repeats + repeat
    assert all(folders[0].index(path) == number // 4 for path, number in instance[0])
    assert len(set(instance[0].values())) > 3  # repeats of a picture differ
    classes = {data.crop(draw) for draws in epochs for draw in draws[12:]}
    assert len(classes) == 5
    assert {crop for crops in instance for crop in crops.values()} | classes == set(data.crops(36)) == set(data.crops(12))
    other = make(folders, seed=1, random_crop=True)
    assert {other.crop(draw) for draw in other.draws(0, 12)[:12]} != set(instance[0].values())


def test_crops_are_those_that_a_run_draws(tmp_path, folders):
    assert len(make(folders).crops(12)) == 3 + 5  # at the centre: one a picture
    assert len(make(folders).crops(2)) <= 4
    square = write_pictures(tmp_path / "square", 2, size=(40, 40)), []
    assert [crop[1:] for crop in make(square, random_crop=True).crops(8)] == [(0, 0, False)] * 2
    data = make(folders, random_crop=True)
    before = [data.pixels(draw) for draw in data.draws(0, 3)]
    data.forget_pictures()
    assert all(np.array_equal(a, data.pixels(draw)) for a, draw in zip(before, data.draws(0, 3)))


@pytest.mark.parametrize("random_crop", [False, True])
def test_half_of_the_crops_are_flipped_and_the_other_half_in_the_next_epoch(tmp_path, folders, random_crop):
    """Instance pictures by repeat, class pictures by round; corners are those of a run without flips."""
    folders = folders[0], write_pictures(tmp_path / "classes", 40, seed=2)
    data, plain = make(folders, random_crop=random_crop, random_flip=True), make(folders, random_crop=random_crop)
    draws = data.draws(0, 240)  # 20 epochs of 12, 6 rounds of 40
    for part, turns in ((draws[:240], 20), (draws[240:], 6)):
        seen = {}
        for draw in part:
            crop, without = data.crop(draw), plain.crop(draw)
            assert crop[:3] == without[:3] and not without[3]
            seen.setdefault((draw.path, draw.crop_number), []).append((draw.turn, crop[3]))
            pixels = plain.pixels(draw)
            assert np.array_equal(data.pixels(draw), pixels[:, :, ::-1] if crop[3] else pixels)
        for flips in seen.values():
            assert [turn for turn, _ in flips] == list(range(turns))
            assert all(flip == (flips[0][1] ^ (turn % 2 == 1)) for turn, flip in flips)  # the other way in every second turn
        first = [flips[0][1] for flips in seen.values()]
        assert 0.2 < np.mean(first) < 0.8 and len(set(first)) == 2
    assert set(data.crops(240)) == {data.crop(draw) for draw in draws}
    assert [make(folders, random_crop=random_crop, random_flip=True).crop(draw) for draw in draws] == [data.crop(draw) for draw in draws]
    other = make(folders, seed=1, random_crop=random_crop, random_flip=True)
    assert [other.crop(draw)[3] for draw in other.draws(0, 12)] != [data.crop(draw)[3] for draw in draws[:12]]


def test_pixels(folders):
    data = make(folders)
    pixels = data.pixels(data.draws(0, 1)[0])
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32 and np.abs(pixels).max() <= 1


def test_instance_folder_errors_and_nothing_written(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures found"):
        load_instance_images(tmp_path / "empty")
    paths = write_pictures(tmp_path / "instance", 2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "instance").iterdir()}
    assert load_instance_images(tmp_path / "instance") == paths
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "instance").iterdir()} == before
    (tmp_path / "instance/bad.jpg").write_text("hello")
    with pytest.raises(ValueError, match="bad.jpg"):
        load_instance_images(tmp_path / "instance")
