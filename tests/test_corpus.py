"""Folders of pictures as users have them: what is read, what is left out, what is refused, and in which
words.
"""

import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image, ImageCms, PngImagePlugin
from trainings import samples_of

from ldm import images
from ldm.image_files import read_image, where_images_lie
from ldm.subjects import load_instance_images
from ldm.training.samples import Cropping

SIZE = (40, 30)
RED = Image.new("RGB", SIZE, (200, 40, 40))


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def long_text(size: int = 2 * 2**20) -> PngImagePlugin.PngInfo:
    """Compressed text as ComfyUI and webui write it: their settings."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "{" * size, zip=True)
    return text


ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", SIZE, (0, 0, 255))]}
# file name -> content; each is read as the red picture, within what its compression and its colours allow
READ = {
    "photo.jpg": encoded(RED, "JPEG", quality=95),
    "PHOTO.JPEG": encoded(RED, "JPEG", quality=95),
    "cmyk.jpg": encoded(RED.convert("CMYK"), "JPEG", quality=95),
    "palette.png": encoded(RED.quantize(8), "PNG"),
    "transparent palette.png": encoded(RED.quantize(8), "PNG", transparency=7),
    "alpha.png": encoded(RED.convert("RGBA"), "PNG"),
    "animated.gif": encoded(RED, "GIF", **ANIMATED),
    "animated.webp": encoded(RED, "WEBP", lossless=True, **ANIMATED),
    "animated.png": encoded(RED, "PNG", **ANIMATED),
    "two pictures.jpg": encoded(RED, "MPO", **ANIMATED),
    "scan.tiff": encoded(RED, "TIFF"),
    "profile.png": encoded(
        RED, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    "damaged profile.png": encoded(RED, "PNG", icc_profile=b"no profile"),
    'it\'s "quoted".png': encoded(RED, "PNG"),
    "two\nlines.png": encoded(RED, "PNG"),
    "мой пёс 狗.png": encoded(RED, "PNG"),
    "wrong suffix.jpg": encoded(RED, "PNG"),
    "damaged exif.webp": encoded(RED, "WEBP", exif=b"MM\0*"),
    "dog.jfif": encoded(RED, "JPEG"),
    "IMG_0001": encoded(RED, "JPEG"),
    "x.JPG.jpeg": encoded(RED, "JPEG"),
    "a JPEG that is called.HEIC": encoded(RED, "JPEG"),
    "2 MB of settings.png": encoded(RED, "PNG", pnginfo=long_text()),
    "damaged text.png": encoded(RED, "PNG", pnginfo=long_text(100)).replace(b"zTXt", b"zTXT", 1),
}
REFUSED = {  # file name -> content, words of the error
    "truncated.jpg": (encoded(RED, "JPEG")[:-200], "not a readable image"),
    "empty.png": (b"", "not a readable image"),
    "text.jpg": (b"hello", "not a readable image"),
    "bomb.png": (bomb(), "too many.*at most 178 million are read.*make it smaller, or remove it"),
    "dot.png": (
        encoded(Image.new("RGB", (1, 1)), "PNG"),
        "sides must be 16 pixels or more and at most 10:1, got 1 x 1",
    ),
    "line.png": (encoded(Image.new("RGB", (20000, 10)), "PNG"), "got 20000 x 10"),
    "panorama.png": (encoded(Image.new("RGB", (2000, 100)), "PNG"), "at most 10:1, got 2000 x 100"),
    "IMG_1.HEIC": (b"\0\0\0\x18ftypheic", "images in HEIC are not read; save it as JPEG or PNG"),
    "two\nlines.jpg": (b"hello", "not a readable image"),
    "HEIC.png": (b"\0\0\0\x18ftypheic", "images in HEIC are not read; save it as JPEG or PNG"),
    "AVIF.jpg": (b"\0\0\0\x1cftypavif", "images in AVIF are not read"),
    "IMG_0002": (b"\0\0\0\x18ftypheic", "images in HEIC are not read"),
    "page.jpg": (b"<!DOCTYPE html><p>Sign in", r"not a readable image \(a web page"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer: fetch the file"),
    "float.tiff": (encoded(Image.new("F", SIZE), "TIFF"), "its numbers are floating-point"),
    "psd.jpg": (b"8BPS\0\1", "images in Photoshop's format are not read"),
}


@pytest.mark.parametrize("name", READ)
def test_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(READ[name])
    (path,) = load_instance_images(tmp_path)
    picture = read_image(path)
    assert picture.size == SIZE and np.abs(np.asarray(picture, int) - np.asarray(RED, int)).max() <= 6


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(tmp_path, name):
    write_pictures(tmp_path, 1)
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load_instance_images(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_costs_the_rotation_at_most(tmp_path, caplog, kind):
    """300 blocks with cut or changed bytes; those that are read tell how to rotate."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "a camera", {0x9003: "2026:01:01 00:00:00"}
    whole, rng, path = exif.tobytes().removeprefix(b"Exif\0\0"), np.random.default_rng(0), tmp_path / "a"
    shapes = set()
    for number in range(100):
        block = bytearray(whole[: int(rng.integers(1, len(whole)))] if number % 2 else whole)
        for place in rng.integers(0, len(block), 3):
            block[place] = rng.integers(256)
        path.write_bytes(encoded(RED, kind, exif=b"Exif\0\0" + bytes(block), quality=95))
        shapes.add(read_image(path).size)
    assert shapes == {SIZE, SIZE[::-1]}
    path.write_bytes(encoded(RED, kind, exif=b"Exif\0\0MM\0*", quality=95))
    for _ in range(2):
        assert read_image(path).size == SIZE
    if kind != "JPEG":  # of which Pillow takes a cut block for an empty one
        assert caplog.text.count("a: its EXIF data is damaged: read as it is, not rotated") == 1


def test_what_lies_beside_images_is_left_out(tmp_path, caplog):
    """What file managers, notebooks and network drives leave there; a pipe, whose content never ends."""
    (good,) = write_pictures(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "a.txt", "m.mp4", "b.svg"):
        (tmp_path / name).write_bytes(b"BM and more")
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        write_pictures(tmp_path / name, 1)
    with caplog.at_level(logging.INFO):
        assert load_instance_images(tmp_path) == [good]
    assert "1 images (left out: 3 hidden files, 2 sub-folders, 5 other files)" in caplog.text
    assert where_images_lie(tmp_path) == ""


def test_a_photo_of_200_megapixels(tmp_path):
    Image.new("L", (16320, 12240), 100).save(tmp_path / "large.jpg", quality=90)
    (path,) = load_instance_images(tmp_path)
    picture = read_image(path)
    assert picture.size == (4080, 3060) and picture.getpixel((9, 9)) == (100, 100, 100)
    assert Image.MAX_IMAGE_PIXELS < 10**8  # Pillow's own bound is as it was


@pytest.mark.parametrize("below, words", [
    ({"data": 2}, "sub-folders are not looked into, and there are 2 in .*/data: give such a folder$"),
    ({"10_sks dog": 1, "1_cat": 2}, "1 in .*10_sks dog, 2 in .*1_cat.*--train_data_repeats=10"),
    ({}, "no images found; put 3-5 of the subject there"),
])  # fmt: skip
def test_pictures_one_level_down_are_pointed_at(tmp_path, below, words):
    (tmp_path / "empty").mkdir()
    for name, count in below.items():
        write_pictures(tmp_path / name, count)
    with pytest.raises(ValueError, match=words):
        load_instance_images(tmp_path)


def test_the_colours_of_an_embedded_profile_become_srgb(tmp_path):
    """Here sRGB's own primaries with linear values, whose conversion is a formula."""
    Image.new("RGB", SIZE, (90, 160, 70)).save(tmp_path / "a.png", icc_profile=_linear_profile())
    found = read_image(tmp_path / "a.png").getpixel((0, 0))
    # IEC 61966-2-1 from linear light
    wanted = [round(255 * (1.055 * (v / 255) ** (1 / 2.4) - 0.055)) for v in (90, 160, 70)]
    assert max(abs(a - b) for a, b in zip(found, wanted)) <= 2


def _linear_profile() -> bytes:
    """sRGB's profile with a linear response: its three curves, each of one gamma, set to 1."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = content.index(b"para")
    while at >= 0:
        content[at : at + 16] = b"para" + bytes(4) + struct.pack(">HHi", 0, 0, 65536)
        at = content.find(b"para", at + 16)
    return bytes(content)


def test_what_lies_around_is_left_out(tmp_path, caplog):
    write_pictures(tmp_path, 2)
    for name in (".DS_Store", "._photo.jpg", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    write_pictures(tmp_path / "sub-folder", 1)
    with caplog.at_level(logging.INFO):
        assert len(load_instance_images(tmp_path)) == 2
    assert "2 images (left out: 2 hidden files, 1 sub-folders, 2 other files)" in caplog.text


def test_links(tmp_path):
    real = write_pictures(tmp_path / "real", 1)[0]
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "good.png").symlink_to(real)
    assert load_instance_images(folder) == [folder / "good.png"]
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="gone.png: not a readable image .*No such file"):
        load_instance_images(folder)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write_pictures(tmp_path, 1)[0]

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(images.Image, "open", refuse)  # the superuser may read everything
    with pytest.raises(ValueError, match="picture_0.png: not a readable image .*Permission denied"):
        load_instance_images(tmp_path)


def test_ten_thousand_pictures(tmp_path):
    content = encoded(Image.new("RGB", (16, 16)), "PNG")
    for number in range(10_000):
        (tmp_path / f"{number}.png").write_bytes(content)
    paths = load_instance_images(tmp_path)
    every = samples_of(paths, [], 1, Cropping(16))
    assert len(paths) == 10_000 and len({sample.path for sample in every.pick(0, 10_000)}) == 10_000
