"""Image files as people have them: each kind is read, or refused by name with what to do."""

import logging

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image

from ldm import image_files


def gradient(mode="RGB", size=(6, 4)):
    array = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".PNG"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    gradient(size=(60, 40)).save(path)
    assert image_files.list_images(tmp_path) == [path]
    assert image_files.read_image(path).size == (60, 40) and image_files.read_image(path).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
def test_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    gradient(mode).save(path)
    assert image_files.read_image(path).mode == "RGB"


def test_alpha_lies_on_white(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert image_files.read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert [p[0] for p in image_files.read_image(tmp_path / "a.png").getdata()] == [0, 128, 255]


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
    read = np.asarray(image_files.read_image(tmp_path / "a.jpg").convert("L"), int)
    assert read.shape == (32, 48) and np.abs(read - np.asarray(upright, int)).max() < 8


def test_what_is_no_picture_is_left_out_and_counted(tmp_path, caplog):
    write_pictures(tmp_path, 2)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with caplog.at_level(logging.INFO):
        assert [path.name for path in image_files.list_images(tmp_path)] == ["picture_0.png", "picture_1.png"]
    assert "2 images (left out: 1 hidden files, 1 sub-folders, 1 other files)" in caplog.text


def test_a_damaged_picture_is_named(tmp_path):
    path = write_pictures(tmp_path, 1)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="picture_0.png: not a readable image"):
        image_files.read_image(path)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match="text.jpg: not a readable image"):
        image_files.read_image(tmp_path / "text.jpg")
