"""Images: crop, convert to and from pixels in [-1, 1], lay out, save. Knows no network."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from ldm.files import appears_whole

PADDING = 2  # pixels around the images of a grid
PAGE_PIXELS, PAGE_HEIGHT = 2**26, 2**14  # of a page of a grid, at most: what programs can show
FORMATS, QUALITY = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}, 95
# of EXIF: where AUTOMATIC1111 writes and reads its text in a JPEG, and what it may take there
DESCRIPTION, EXIF_PART, USER_COMMENT, UNICODE, LARGEST_EXIF = 0x010E, 0x8769, 0x9286, b"UNICODE\0", 65_000
logger = logging.getLogger(__name__)


def resize_short_side(image: Image.Image, size: int) -> np.ndarray:
    """(H, W, 3) uint8 whose short side is `size`."""
    scale = size / min(image.size)
    sides = [max(size, round(side * scale)) for side in image.size]
    return np.asarray(image if sides == list(image.size) else image.resize(sides, Image.LANCZOS))


def pad_to_square(image: Image.Image, size: int, mode: str = "edge") -> np.ndarray:
    """(size, size, ...) uint8: the whole image, shrunk or enlarged to fit, at the centre.

    Args:
        mode: of numpy.pad: what is beside it, its edges drawn out or, with "constant", 0.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    array = np.asarray(
        image if image.size == (width, height) else image.resize((width, height), Image.LANCZOS)
    )
    missing = [((size - side) // 2, size - side - (size - side) // 2) for side in (height, width)]
    return np.pad(array, missing + [(0, 0)] * (array.ndim - 2), mode=mode)


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


def cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: the image shrunk or enlarged until it covers that, what juts out cut off evenly."""
    return np.asarray(ImageOps.fit(image, (width, height), Image.LANCZOS))


def save_image(array: np.ndarray, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write (H, W, 3) uint8 as PNG, JPEG or WebP, by the name, whole or not at all.

    Args:
        texts: that the file carries: in a PNG under their names, else the first in EXIF's user comment, the
            second in its description, which is to be ASCII.

    Raises FileExistsError rather than overwrite a file.
    """
    path, extra = Path(path), {}
    if path.suffix == ".png":
        extra["pnginfo"] = PngInfo()
        for name, text in (texts or {}).items():
            extra["pnginfo"].add_text(name, text)
    else:
        extra |= {"quality": QUALITY, "exif": _exif(*(texts or {}).values())}
    with appears_whole(path, replace=False) as file:
        Image.fromarray(array).save(file, format=FORMATS[path.suffix], **extra)


def _exif(comment: str = "", description: str = "") -> bytes:
    exif = Image.Exif()
    if comment:
        exif[DESCRIPTION] = description
        exif[EXIF_PART] = {USER_COMMENT: UNICODE + comment.encode("utf-16-be")}
    content = exif.tobytes() if comment else b""
    return content if len(content) <= LARGEST_EXIF else b""


def read_texts(path: Path) -> dict[str, str]:
    """What `save_image` and other programs write into an image: the texts of a PNG, else `parameters` and
    `dreambooth`.
    """
    with Image.open(path) as image:
        if image.format == "PNG":
            image.load()  # texts may stand behind the pixels
            return dict(image.text)
        exif = image.getexif()
        comment = exif.get_ifd(EXIF_PART).get(USER_COMMENT, b"")
        found = {"dreambooth": exif.get(DESCRIPTION, "")}
        if isinstance(comment, bytes) and comment.startswith(UNICODE):
            found["parameters"] = comment[len(UNICODE) :].decode("utf-16-be", "replace")
        return {name: text for name, text in found.items() if text}


def free_path(folder: Path, stem: str, suffix: str = ".png", start: int = 0) -> Path:
    """The first `stem-00000.png`, from number `start` upwards, that the folder does not have yet."""
    while (path := folder / f"{stem}{start:05d}{suffix}").exists():
        start += 1
    return path


def grid(images: np.ndarray, columns: int, padding: int = PADDING) -> np.ndarray:
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


class GridPages:
    """Images side by side, in as many files as it takes: a page is written when it is full.

    Args:
        folder, stem: of the files, which are numbered from the first free name on.
        columns: images per row.
    """

    def __init__(self, folder: Path, stem: str, columns: int) -> None:
        self.folder, self.stem, self.columns = folder, stem, columns
        self._images: list[np.ndarray] = []

    def add(self, images: Sequence[np.ndarray]) -> None:
        """(H, W, 3) uint8 each. One of another size than the last begins a page."""
        for image in images:
            height, width, _ = image.shape
            if self._images and self._images[0].shape != image.shape:
                self.save()
            rows = max(1, min(PAGE_PIXELS // (self.columns * height * width), PAGE_HEIGHT // height))
            self._images.append(image)
            if len(self._images) == rows * self.columns:
                self.save()

    def save(self) -> None:
        """Write the page in hand, if anything is on it."""
        if self._images:
            path = free_path(self.folder, self.stem)
            save_image(grid(np.stack(self._images), self.columns), path)
            logger.info("grid: %s", path)
            self._images = []


def with_caption(array: np.ndarray, caption: str, height: int = 22) -> np.ndarray:
    """The image with a line of text above it."""
    canvas = Image.new("RGB", (array.shape[1], height), "white")
    ImageDraw.Draw(canvas).text((4, 4), caption, fill="black", font_size=13)
    return np.concatenate([np.asarray(canvas), array])
