"""Pictures: find, read, crop, convert to and from pixels in [-1, 1], save. Knows no network."""

import logging
import os
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageOps

from ldm.device import partial_path

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw"}  # pictures, too: not to be passed over silently
SMALLEST_SIDE, LARGEST_ASPECT = 16, 10
logger = logging.getLogger(__name__)


def read_image(path: Path) -> Image.Image:
    """The picture as sRGB, upright (EXIF orientation applied), transparency on white; of an animation or MPO the first frame.

    Raises:
        ValueError: the file is damaged or no picture; the message names it.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            profile = picture.info.get("icc_profile") if picture.mode in ("RGB", "RGBA") else None
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits: PIL's own conversion clips at 255
                picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
            if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return _to_srgb(picture.convert("RGB"), profile)
    except Exception as error:  # the reader raises whatever the damage leads to
        raise ValueError(f"{path}: not a readable picture ({str(error) or type(error).__name__}); remove or replace it") from None


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of an embedded profile (Display P3 on phones) as sRGB has them; a damaged profile is passed over."""
    if not profile:
        return picture
    try:
        return ImageCms.profileToProfile(picture, BytesIO(profile), ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError):
        return picture


def require_usable(path: Path) -> None:
    """Raises ValueError where a picture cannot be read, or is too small or too narrow to learn from."""
    width, height = read_image(path).size
    if min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST_ASPECT * min(width, height):
        raise ValueError(
            f"{path}: {width} x {height} pixels, sides of {SMALLEST_SIDE} or more and at most {LARGEST_ASPECT}:1 are wanted; remove or crop it"
        )


def list_images(folder: Path) -> list[Path]:
    """The picture files in a folder, in the order of their names; everything else is left out and counted in the log.

    A file counts as a picture by its suffix, so that one which is damaged is noticed instead of passed over.

    Raises:
        ValueError: a picture is of a format that is not read.
    """
    images, left_out = [], {"hidden files": 0, "sub-folders": 0, "other files": 0}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            left_out["hidden files"] += 1
        elif path.is_dir():
            left_out["sub-folders"] += 1
        elif path.suffix.lower() in SUFFIXES:
            images.append(path)
        elif path.suffix.lower() in NOT_READ:
            raise ValueError(f"{path}: pictures in {path.suffix[1:].upper()} are not read; save it as JPEG or PNG, or remove it")
        else:
            left_out["other files"] += 1
    skipped = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    logger.info("%s: %d pictures%s", folder, len(images), f" (left out: {skipped})" if skipped else "")
    return images


def resize_short_side(picture: Image.Image, size: int) -> np.ndarray:
    """(H, W, 3) uint8 whose short side is `size`."""
    scale = size / min(picture.size)
    sides = [max(size, round(side * scale)) for side in picture.size]
    return np.asarray(picture if sides == list(picture.size) else picture.resize(sides, Image.LANCZOS))


def crop_corner(shape: tuple[int, ...], size: int, rng: np.random.Generator | None = None) -> tuple[int, int]:
    """Top and left of a square of an (H, W, ...) picture: at the centre, or where `rng` says."""
    top, left = (int(rng.integers(0, side - size + 1)) if rng else (side - size) // 2 for side in shape[:2])
    return top, left


def to_pixels(array: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(np.moveaxis(array.astype(np.float32) / 127.5 - 1, -1, -3))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1] to uint8 (..., H, W, 3)."""
    return np.moveaxis(((pixels.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8), -3, -1)


def save_image(array: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 as PNG, whole or not at all. Raises FileExistsError rather than overwrite a file."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            Image.fromarray(array).save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # unlike a rename, never over a file that is there
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if path.exists():
                raise FileExistsError(f"{path}: exists already") from None
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def free_path(folder: Path, stem: str, suffix: str = ".png", start: int = 0) -> Path:
    """The first `stem-00000.png`, from number `start` upwards, that the folder does not have yet."""
    while (path := folder / f"{stem}{start:05d}{suffix}").exists():
        start += 1
    return path


def grid(images: np.ndarray, columns: int, padding: int = 2) -> np.ndarray:
    """(N, H, W, 3) uint8 side by side on white."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (padding + place * (side + padding) for place, side in zip(divmod(index, columns), (height, width)))
        sheet[top : top + height, left : left + width] = image
    return sheet


def with_caption(array: np.ndarray, caption: str, height: int = 22) -> np.ndarray:
    """The picture with a line of text above it."""
    canvas = Image.new("RGB", (array.shape[1], height), "white")
    ImageDraw.Draw(canvas).text((4, 4), caption, fill="black", font_size=13)
    return np.concatenate([np.asarray(canvas), array])
