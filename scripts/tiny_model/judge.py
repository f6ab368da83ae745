"""The judge: says which class, colour and place a picture of the tiny model shows, and whether it shows a
held-out subject.

A small convolutional network; scripts/tiny_model/train_judge.py trained it, on the generator's pictures only,
never on drawn ones. Beside its weights lie pictures that it was not trained on, with which the judge itself
is measured before it judges.
"""

import json
import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import pictures

from ldm import images
from ldm.image_files import read_image
from ldm.networks.layer_set import layers_of_this_device

WEIGHTS, HELD_OUT, LABELS = (
    ROOT / "models" / f"tiny_judge{suffix}" for suffix in (".safetensors", "_held_out.png", ".json")
)
HEADS = ("class", "colour", "place", "subject")
HELD_OUT_SHEET = (16, 24)  # rows, columns
SIDE = pictures.SIZE // 2
BODY = ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1))  # channels and stride of its convolutions


class Judge(nn.Cell):
    """Pixels (B, 3, 64, 64) in [-1, 1] to scores (B, sum of heads) and features (B, 256).

    Args:
        sizes: how many classes, colours, places and subjects there are.
    """

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        layers, body, channels = layers_of_this_device(), [], 3
        for width, stride in BODY:
            body += [layers.Conv2d(channels, width, 3, stride, 1), layers.GroupNormSiLU(8, width, 1e-5)]
            channels = width
        self.body = nn.SequentialCell(body)
        self.hidden, self.heads = layers.Dense(128 * 16, 256), layers.Dense(256, sum(sizes))
        self.pool = ops.AvgPool(2, 2)

    def construct(self, x):
        features = ops.relu(self.hidden(self.pool(self.body(x)).reshape(x.shape[0], -1)))
        return self.heads(features), features


class Verdicts:
    """What the judge says about N pictures.

    Attributes:
        classes, colours, places: (N,) of str.
        subjects: subject -> (N,) of bool.
        features: (N, 256) of length 1.
    """

    def __init__(self, scores: np.ndarray, features: np.ndarray, labels: dict[str, list[str]]) -> None:
        parts = np.split(scores, np.cumsum([len(labels[head]) for head in HEADS])[:-1], axis=1)
        self.classes, self.colours, self.places = (
            np.array(labels[head])[part.argmax(1)] for head, part in zip(HEADS, parts[:3])
        )  # fmt: skip
        self.subjects = {name: parts[3][:, column] > 0 for column, name in enumerate(labels["subject"])}
        self.features = features / np.linalg.norm(features, axis=1, keepdims=True)

    def diversity(self) -> float:
        """Mean distance of two pictures' features, as one less their cosine."""
        count = len(self.features)
        return float(1 - (np.square(self.features.sum(0)).sum() - count) / (count * (count - 1)))


class Judges:
    """The trained judge, from its files in models/."""

    def __init__(self) -> None:
        noted = json.loads(LABELS.read_text())
        self.labels, self.class_of = noted["labels"], noted["class_of"]  # a subject's class
        rows, columns = HELD_OUT_SHEET
        sheet = np.asarray(read_image(HELD_OUT)).reshape(rows, SIDE, columns, SIDE, 3)
        # pictures of the generator that nothing was trained on
        self.held_out = sheet.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
        self.judge = Judge([len(self.labels[head]) for head in HEADS])
        with safe_open(WEIGHTS, "np") as file:
            for parameter in self.judge.get_parameters():
                parameter.set_data(Tensor(file.get_tensor(parameter.name).astype(np.float32)))

    def __call__(self, array: np.ndarray, batch: int = 32) -> Verdicts:
        """Judge (N, 64, 64, 3) uint8."""
        results = []
        for start in range(0, len(array), batch):
            part = array[start : start + batch]
            # one shape, one graph
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            results.append(
                [output.asnumpy()[: len(part)] for output in self.judge(Tensor(images.to_pixels(padded)))]
            )
        return Verdicts(*(np.concatenate(outputs) for outputs in zip(*results)), self.labels)

    def accuracy(self) -> dict[str, float]:
        """How right the judge is on the pictures that it was not trained on, as fractions."""
        facts, verdicts = json.loads(LABELS.read_text())["held_out"], self(self.held_out)
        truth = {
            key: np.array([fact[key] for fact in facts]) for key in ("class", "colour", "place", "subject")
        }
        tinted = truth["colour"] != ""
        said = np.stack([verdicts.subjects[name] for name in self.labels["subject"]], 1)
        true = np.stack([truth["subject"] == name for name in self.labels["subject"]], 1)
        return {
            "judge_class_right": float((verdicts.classes == truth["class"]).mean()),
            "judge_place_right": float((verdicts.places == truth["place"]).mean()),
            "judge_colour_right": float((verdicts.colours == truth["colour"])[tinted].mean()),
            "judge_subject_recall": float(said[true].mean()),
            "judge_subject_false_alarms": float(said[~true].any(axis=None) and (said & ~true).any(1).mean()),
        }
