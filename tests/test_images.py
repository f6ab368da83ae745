import logging

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image

from ldm import files, images


def gradient(mode="RGB", size=(6, 4)):
    array = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".PNG"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    gradient(size=(60, 40)).save(path)
    assert images.list_images(tmp_path) == [path]
    assert images.read_image(path).size == (60, 40) and images.read_image(path).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
def test_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    gradient(mode).save(path)
    assert images.read_image(path).mode == "RGB"


def test_alpha_lies_on_white(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert [p[0] for p in images.read_image(tmp_path / "a.png").getdata()] == [0, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(
        np.kron(np.array([[0, 60, 120], [180, 210, 255]], np.uint8), np.ones((16, 16), np.uint8))
    )
    inverse = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = upright.transpose(Image.Transpose[inverse[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=100)
    read = np.asarray(images.read_image(tmp_path / "a.jpg").convert("L"), int)
    assert read.shape == (32, 48) and np.abs(read - np.asarray(upright, int)).max() < 8


def test_what_is_no_picture_is_left_out_and_counted(tmp_path, caplog):
    write_pictures(tmp_path, 2)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with caplog.at_level(logging.INFO):
        assert [path.name for path in images.list_images(tmp_path)] == ["picture_0.png", "picture_1.png"]
    assert "2 images (left out: 1 hidden files, 1 sub-folders, 1 other files)" in caplog.text


def test_a_damaged_picture_is_named(tmp_path):
    path = write_pictures(tmp_path, 1)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="picture_0.png: not a readable image"):
        images.read_image(path)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match="text.jpg: not a readable image"):
        images.read_image(tmp_path / "text.jpg")


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
