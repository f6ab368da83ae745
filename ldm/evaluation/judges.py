"""Images and texts to unit vectors, by networks whose weights the user has."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor
from PIL import Image

from ldm.evaluation.vit import Images, Texts, load_clip, load_dino
from ldm.tokenizer import Tokenizer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 16


def shortest_side(image: Image.Image, size: int) -> Image.Image:
    """Shrunk or enlarged until the shorter side is `size`, by bicubic interpolation."""
    width, height = image.size
    sides = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    return image.resize(sides, Image.BICUBIC)


def centre(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(3, H, W) float32."""
    values = np.asarray(image, np.float32) / 255
    return ((values - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


def in_batches(network, *inputs: np.ndarray) -> np.ndarray:
    """What a network answers to rows, BATCH at a time; the last batch is filled up: one shape, one graph."""
    count, found = len(inputs[0]), []
    for start in range(0, count, BATCH):
        rows = [its[start : start + BATCH] for its in inputs]
        rows = [np.concatenate([its, np.repeat(its[-1:], BATCH - len(its), 0)]) for its in rows]
        found.append(network(*map(Tensor, rows)).asnumpy()[: min(BATCH, count - start)])
    return np.concatenate(found)


class ClipJudge:
    """CLIP of transformers: images and texts as unit vectors (N, D)."""

    def __init__(self, path: Path) -> None:
        self.clip = load_clip(path)
        self.image_network, self.text_network = Images(self.clip), Texts(self.clip)
        self.tokenizer = Tokenizer(self.clip.length, padding="end")

    def pixels(self, image: Image.Image) -> np.ndarray:
        side = self.clip.side
        return normalised(centre(shortest_side(image, side), side), CLIP_MEAN, CLIP_STD)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return in_batches(self.image_network, np.stack([self.pixels(image) for image in images]))

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        token_ids = self.tokenizer(prompts)
        is_end = np.zeros(token_ids.shape, np.float32)
        is_end[np.arange(len(prompts)), (token_ids == self.tokenizer.end_id).argmax(1)] = 1
        return in_batches(self.text_network, token_ids, is_end)


class DinoJudge:
    """DINO's vision transformer: images as unit vectors (N, width).

    Args:
        preprocessing: `transformers`: the whole image on a square, bilinear; `original`: as DINO was
            evaluated, the shorter side on 256 of 224, bicubic, and the square at the centre.
    """

    def __init__(self, path: Path, preprocessing: str = "transformers") -> None:
        self.network, self.preprocessing = load_dino(path), preprocessing

    def pixels(self, image: Image.Image) -> np.ndarray:
        side = self.network.side
        if self.preprocessing == "transformers":
            shown = image.resize((side, side), Image.BILINEAR)
        else:
            shown = centre(shortest_side(image, side * 256 // 224), side)
        return normalised(shown, IMAGENET_MEAN, IMAGENET_STD)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return in_batches(self.network, np.stack([self.pixels(image) for image in images]))
