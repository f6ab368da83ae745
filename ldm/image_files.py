"""Image files as people have them: found in a folder, told apart by their content, read. Knows no network."""

import contextlib
import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# their content is a TIFF's: only the name tells
RAW_SUFFIXES = {".dng", ".cr2", ".cr3", ".nef", ".arw"}
# images, too: not to be skipped silently
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd"}
CONTENTS = {  # how other things begin
    rb".{4}ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)": "HEIC",
    rb".{4}ftypavi[fs]": "AVIF",
    rb"\xff\x0a|\0{3}\x0cJXL ": "JPEG XL",
    rb"\0{3}\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"8BPS": "Photoshop's format",
}
NO_IMAGES = {
    rb"version https://git-lfs": "a Git-LFS pointer: fetch the file itself",
    rb"\s*<(!doctype|html|\?xml|svg)": "a web page or SVG",
    rb"\Z": "empty",
}
PNG = b"\x89PNG\r\n\x1a\n"
SMALLEST_SIDE, LARGEST_ASPECT = 16, 10
LARGEST, LARGEST_JPEG = 178_000_000, 1_000_000_000  # pixels; a JPEG can be decoded smaller
REDUCED_ABOVE, REDUCED_SIDE = 64_000_000, 2048  # pixels; the short side that a JPEG above them keeps at least
UPRIGHT = {  # EXIF's orientation: what turns the image
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")  # repeats and prompt
MASK = ".mask.png"  # after an image's name
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
NOTE = "drawn_from.json"  # beside generated class images, see ldm/sampling/class_images.py
T = TypeVar("T")
logger = logging.getLogger(__name__)


def read_image(path: Path) -> Image.Image:
    """The image as sRGB, upright (EXIF orientation applied), transparency on white; of an animation or MPO
    the first frame. A JPEG of more than 64 million pixels is decoded to a half, a quarter or an eighth.

    Raises:
        ValueError: the file is damaged, too large or no image that is read; the message names it.
    """
    return _read_with(_read, path)


def _read_with(read: Callable[[Path, Path | BytesIO], T], path: Path) -> T:
    """What `read` makes of a file, of a PNG once more without its text. Raises as `read_image` does."""
    if reason := not_read(path):
        raise ValueError(f"{path}: {reason}")
    try:
        try:
            return read(path, path)
        except _TooLarge:
            raise
        except Exception:  # a reader raises whatever the damage leads to
            if not _beginning(path).startswith(PNG):
                raise
            return read(path, _without_text(path))
    except Exception as error:
        raise ValueError(f"{path}: {_what_is_wrong(path, error)}") from None


class _TooLarge(ValueError):
    """So many pixels that hardly anybody has the memory for them."""


def _read(path: Path, file: Path | BytesIO) -> Image.Image:
    with _opened(file) as image:
        pixels, is_jpeg = image.width * image.height, image.format in ("JPEG", "MPO")
        if pixels > (LARGEST_JPEG if is_jpeg else LARGEST):
            raise _TooLarge(f"{image.width} x {image.height} pixels are too many")
        if pixels > REDUCED_ABOVE and is_jpeg:
            factor = REDUCED_SIDE / min(image.size)
            image.draft(image.mode, tuple(round(side * factor) for side in image.size))
        image.load()
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
        image = _upright(image, path)
        if image.mode == "F":
            raise ValueError("its numbers are floating-point, of no known range: save it as JPEG or PNG")
        if image.mode.startswith("I"):  # 16 bits: PIL's own conversion clips at 255
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        if image.mode in TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return _to_srgb(image.convert("RGB"), profile)


@contextlib.contextmanager
def _opened(file: Path | BytesIO) -> Iterator[Image.Image]:
    """Pillow's image of a file of FORMATS, whatever its name; with our bound, and without Pillow's warnings.

    Raises _TooLarge, and whatever Pillow does.
    """
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, LARGEST_JPEG // 2  # Pillow refuses twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except Image.DecompressionBombError:
        raise _TooLarge("too many pixels") from None
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _without_text(path: Path) -> BytesIO:
    """A PNG with what shapes its pixels and nothing else. Other programs fill its text with megabytes of
    their settings, compressed, and Pillow refuses what unfolds to more than a megabyte.
    """
    content, place, kept = path.read_bytes(), len(PNG), [PNG]
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length  # length, kind, and a checksum behind the data
        if kind[:1].isupper() or kind in (b"tRNS", b"iCCP", b"eXIf"):  # critical chunks have a capital
            kept.append(content[place:end])
        place = end
    return BytesIO(b"".join(kept))


def _upright(image: Image.Image, path: Path) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # the reader raises whatever the damage leads to
        _warn_once(f"{path}: its EXIF data is damaged: read as it is, not rotated")
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


@lru_cache(maxsize=10_000)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of an embedded profile (Display P3 on phones) as sRGB has them; a damaged profile is passed
    over.
    """
    if not profile:
        return image
    try:
        return ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError):
        return image


def mask_file(path: Path) -> Path:
    """Where the mask of an image lies, if it has one of its own."""
    return path.with_name(path.stem + MASK)


def _read_white(path: Path, file: Path | BytesIO) -> Image.Image:
    """How white an image is, what is transparent being black (L)."""
    with _opened(file) as image:
        image = _upright(image, path).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("L")


def _read_alpha(path: Path, file: Path | BytesIO) -> Image.Image | None:
    """The alpha channel (L) of an image that has one."""
    with _opened(file) as image:
        if image.mode not in TRANSPARENT and "transparency" not in image.info:
            return None
        return _upright(image, path).convert("RGBA").getchannel("A")


def mask_of(path: Path) -> Image.Image | None:
    """Where an image shows its subject, white, in shades of grey (L): of `NAME.mask.png` beside it, or, of
    one that is not opaque, its alpha channel; else None.

    Raises:
        ValueError: the mask cannot be read, has another shape than the image, or is black.
    """
    file = mask_file(path)
    if file.is_file():
        mask, sides = _read_with(_read_white, file), read_image(path).size
        if abs(mask.width * sides[1] / (mask.height * sides[0]) - 1) > 0.02:
            raise ValueError(
                f"{file}: must have the shape of its image, {sides[0]} x {sides[1]}, got {mask.width} x "
                f"{mask.height}"
            )
        mask = mask.resize(sides)
    else:
        mask = _read_with(_read_alpha, path)
        if mask is None:
            return None
    lowest, highest = mask.getextrema()
    if not highest:
        raise ValueError(f"{file if file.is_file() else path}: its mask is empty: nothing would be learned")
    return None if lowest == 255 else mask


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def not_read(path: Path) -> str:
    """Why an image is not of the formats that are read, by its content or, of a camera, its name; else ""."""
    try:
        beginning = _beginning(path)
    except OSError:
        return ""
    found = next((name for start, name in CONTENTS.items() if re.match(start, beginning, re.DOTALL)), None)
    if not found and path.suffix.lower() in RAW_SUFFIXES:
        found = path.suffix[1:].upper()
    return f"images in {found} are not read; save it as JPEG or PNG, or remove it" if found else ""


def _what_is_wrong(path: Path, error: Exception) -> str:
    if isinstance(error, _TooLarge):
        most = f"{LARGEST // 10**6} million are read, of a JPEG {LARGEST_JPEG // 10**6} million"
        return f"{error}, at most {most}; make it smaller, or remove it"
    if isinstance(error, OSError) and error.strerror:
        return f"not a readable image ({error.strerror}); remove or replace it"
    beginning = _beginning(path).lower()
    found = next((name for start, name in NO_IMAGES.items() if re.match(start, beginning)), None)
    if isinstance(error, UnidentifiedImageError):
        found = found or f"its content is of none of {', '.join(FORMATS)}"
    return f"not a readable image ({found or str(error) or type(error).__name__}); remove or replace it"


def _is_image(path: Path) -> bool:
    """Whether the content is an image's, or the name: one that is damaged is not skipped."""
    if path.suffix.lower() in SUFFIXES | RAW_SUFFIXES or path.suffix.lower() in NOT_READ or not_read(path):
        return True
    try:
        with _opened(path):
            return True
    except Exception:  # no image, or no regular file
        return False


def require_usable(path: Path) -> None:
    """Raises ValueError where an image cannot be read, or is too small or too narrow to learn from."""
    width, height = read_image(path).size
    if min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST_ASPECT * min(width, height):
        raise ValueError(
            f"{path}: sides must be {SMALLEST_SIDE} pixels or more and at most "
            f"{LARGEST_ASPECT}:1, got {width} x {height}; remove or crop it"
        )


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder, in the order of their names; everything else is left out and counted in
    the log.

    A file is an image by its content, or by its suffix, so that one which is damaged is noticed instead of
    skipped. `NAME.mask.png` beside an image of that name is the mask of it.

    Raises:
        ValueError: an image is of a format that is not read.
    """
    images, left_out = [], {"hidden files": 0, "sub-folders": 0, "masks": 0, "captions": 0, "other files": 0}
    paths = sorted(folder.iterdir())
    stems, names = {path.stem for path in paths}, set(paths)
    for path in paths:
        if path.name.startswith("."):
            left_out["hidden files"] += 1
        elif path.name.endswith(MASK) and path.name.removesuffix(MASK) in stems:
            left_out["masks"] += 1
        elif path.is_dir():
            left_out["sub-folders"] += 1
        elif path.suffix == ".txt" and any(path.with_suffix(suffix) in names for suffix in SUFFIXES):
            left_out["captions"] += 1
        elif (path.exists() and not path.is_file()) or not _is_image(path):  # a pipe would never end
            left_out["other files"] += path.name != NOTE
        elif reason := not_read(path):
            raise ValueError(f"{path}: {reason}")
        else:
            images.append(path)
    skipped = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    logger.info("%s: %d images%s", folder, len(images), f" (left out: {skipped})" if skipped else "")
    return images


def valid_images(folder: Path) -> list[Path]:
    """The readable images of a folder; damaged ones are named in the log and left out."""
    valid = []
    for path in list_images(folder):
        try:
            read_image(path)
            valid.append(path)
        except ValueError as error:
            logger.warning("skipping class image: %s", error)
    return valid


def images_below(folder: Path) -> dict[Path, int]:
    """The sub-folders of a folder that hold images, each with their number; but for those that other
    programs make: .ipynb_checkpoints, @eaDir, __MACOSX.
    """
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] not in ".@_"]
    counts = {path: sum(entry.is_file() and _is_image(entry) for entry in path.iterdir()) for path in below}
    return {path: count for path, count in counts.items() if count}


def where_images_lie(folder: Path) -> str:
    """What to do where images lie one level down, as the end of a sentence; "" where none do."""
    found = images_below(folder)
    if not found:
        return ""
    named = ", ".join(f"{count} in {path}" for path, count in list(found.items())[:3])
    more = f" and more in {len(found) - 3} others" if len(found) > 3 else ""
    kohya = KOHYA_FOLDER.fullmatch(next(iter(found)).name)
    repeats = f" (for what its name says of repeats: --train_data_repeats={kohya[1]})" if kohya else ""
    return f"sub-folders are not looked into, and there are {named}{more}: give such a folder{repeats}"
