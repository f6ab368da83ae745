"""Images: find, read, crop, convert to and from pixels in [-1, 1], save. Knows no network."""

import logging
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageOps

from ldm.files import appears_whole

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# images, too: not to be skipped silently
NOT_READ = {
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
}
SMALLEST_SIDE, LARGEST_ASPECT = 16, 10
logger = logging.getLogger(__name__)


def read_image(path: Path) -> Image.Image:
    """The image as sRGB, upright (EXIF orientation applied), transparency on white; of an animation or MPO
    the first frame.

    Raises:
        ValueError: the file is damaged or no image; the message names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: PIL's own conversion clips at 255
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return _to_srgb(image.convert("RGB"), profile)
    except Exception as error:  # the reader raises whatever the damage leads to
        raise ValueError(
            f"{path}: not a readable image ({str(error) or type(error).__name__}); remove or replace it"
        ) from None


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

    A file counts as an image by its suffix, so that one which is damaged is noticed instead of skipped.

    Raises:
        ValueError: an image is of a format that is not read.
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
            raise ValueError(
                f"{path}: images in {path.suffix[1:].upper()} are not read; save it as JPEG or PNG, or "
                f"remove it"
            )
        else:
            left_out["other files"] += 1
    skipped = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    logger.info("%s: %d images%s", folder, len(images), f" (left out: {skipped})" if skipped else "")
    return images


def resize_short_side(image: Image.Image, size: int) -> np.ndarray:
    """(H, W, 3) uint8 whose short side is `size`."""
    scale = size / min(image.size)
    sides = [max(size, round(side * scale)) for side in image.size]
    return np.asarray(image if sides == list(image.size) else image.resize(sides, Image.LANCZOS))


def crop_corner(shape: tuple[int, ...], size: int, rng: np.random.Generator | None = None) -> tuple[int, int]:
    """Top and left of a square of an (H, W, ...) image: at the centre, or where `rng` says."""
    top, left = (int(rng.integers(0, side - size + 1)) if rng else (side - size) // 2 for side in shape[:2])
    return top, left


def to_pixels(array: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(np.moveaxis(array.astype(np.float32) / 127.5 - 1, -1, -3))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1] to uint8 (..., H, W, 3)."""
    return np.moveaxis(((pixels.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8), -3, -1)


def save_image(array: np.ndarray, path: str | Path) -> None:
    """Write (H, W, 3) uint8 as PNG, whole or not at all.

    Raises FileExistsError rather than overwrite a file.
    """
    with appears_whole(Path(path), replace=False) as file:
        Image.fromarray(array).save(file, format="PNG")


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
    sheet = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8
    )
    for index, image in enumerate(images):
        top, left = (
            padding + place * (side + padding) for place, side in zip(divmod(index, columns), (height, width))
        )
        sheet[top : top + height, left : left + width] = image
    return sheet


def with_caption(array: np.ndarray, caption: str, height: int = 22) -> np.ndarray:
    """The image with a line of text above it."""
    canvas = Image.new("RGB", (array.shape[1], height), "white")
    ImageDraw.Draw(canvas).text((4, 4), caption, fill="black", font_size=13)
    return np.concatenate([np.asarray(canvas), array])
