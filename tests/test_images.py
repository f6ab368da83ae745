import numpy as np
import pytest
from PIL import Image

from ldm import files, images


def test_resize_and_crop():
    wide = images.resize_short_side(Image.fromarray(np.zeros((40, 100, 3), np.uint8)), 20)
    assert wide.shape == (20, 50, 3)
    assert images.crop_corner(wide.shape, 20) == (0, 15)
    corners = {images.crop_corner(wide.shape, 20, np.random.default_rng(seed)) for seed in range(300)}
    assert corners == {(0, left) for left in range(31)}


def test_pixels_and_back():
    array = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pixels = images.to_pixels(array)
    assert (
        pixels.shape == (2, 3, 5, 7) and pixels.dtype == np.float32 and -1 <= pixels.min() < pixels.max() <= 1
    )
    assert np.array_equal(images.to_uint8(pixels), array)


def test_saving_never_overwrites_and_leaves_nothing_half(tmp_path):
    path, array = tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8)
    images.save_image(array, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        images.save_image(array + 9, path)
    with pytest.raises((TypeError, KeyError, ValueError)):
        images.save_image(np.zeros((2, 2, 7), np.uint8), tmp_path / "b.png")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert images.free_path(tmp_path, "x").name == "x00000.png"


def test_saving_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError("not supported")

    monkeypatch.setattr(files.os, "link", no_link)
    array = np.zeros((2, 2, 3), np.uint8)
    images.save_image(array, tmp_path / "a.png")
    with pytest.raises(FileExistsError):
        images.save_image(array, tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_grid():
    sheet = images.grid(np.stack([np.full((2, 3, 3), v, np.uint8) for v in (1, 2, 3)]), columns=2, padding=1)
    assert sheet.shape == (7, 9, 3)
    assert sheet[1, 1, 0] == 1 and sheet[1, 5, 0] == 2 and sheet[4, 1, 0] == 3 and sheet[4, 5, 0] == 255


def test_a_grid_of_many_is_cut_into_pages(tmp_path, monkeypatch):
    """20,000 of them take the memory of one page."""
    monkeypatch.setattr(images, "PAGE_PIXELS", 3 * 4 * 2 * 7)  # 7 rows of 2
    pages = images.GridPages(tmp_path, "grid-", columns=2)
    for number in range(10):
        pages.add(np.full((3, 3, 4, 3), number, np.uint8))
        assert len(pages._images) < 14
    pages.save()
    pages.save()  # nothing is left
    sizes = [Image.open(path).size for path in sorted(tmp_path.iterdir())]
    assert sizes == [(14, 7 * 5 + 2), (14, 7 * 5 + 2), (14, 5 + 2)]
    first = np.asarray(Image.open(tmp_path / "grid-00000.png"))
    assert first[3, 3, 0] == 0 and first[-4, -4, 0] == 4  # the fourteenth


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_carries_its_texts(tmp_path, suffix):
    texts = {"parameters": "a dog 犬\nSteps: 3", "dreambooth": '{"a": "\\u72ac"}'}
    array = np.linspace(0, 255, 40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    images.save_image(array, tmp_path / f"a.{suffix}", texts)
    images.save_image(array, tmp_path / f"b.{suffix}")
    assert images.read_texts(tmp_path / f"a.{suffix}") == texts
    assert images.read_texts(tmp_path / f"b.{suffix}") == {}
    back = np.asarray(Image.open(tmp_path / f"a.{suffix}"))
    assert np.abs(back.astype(int) - array).max() <= (0 if suffix == "png" else 6)
    long = {"parameters": "x" * 70_000, "dreambooth": "{}"}  # more than a JPEG has room for
    images.save_image(array, tmp_path / f"c.{suffix}", long)
    assert images.read_texts(tmp_path / f"c.{suffix}") == (long if suffix == "png" else {})


def test_a_grid_of_images_of_two_sizes_has_two_pages(tmp_path):
    pages = images.GridPages(tmp_path, "grid-", 2)
    for side in (4, 6, 6):
        pages.add([np.zeros((side, side, 3), np.uint8)])
    pages.save()
    assert [Image.open(path).size for path in sorted(tmp_path.iterdir())] == [(8, 8), (18, 10)]
