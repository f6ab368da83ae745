"""Emoji drawings for the tiny model's pictures: fetched as npm packages, rendered to RGBA arrays.

The packages (all MIT or Apache-2.0) are installed by this script into the work folder; no drawing is copied
into the repository except inside the five example pictures. Needs `npm` and the packages of
requirements-tiny.txt.
"""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

PACKAGES = {  # set -> (npm package, licence)
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", "Apache-2.0"),
    "fluent-emoji": ("@iconify-json/fluent-emoji@1.2.7", "MIT"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "Apache-2.0"),
}
CLASSES = {  # class word -> icon names, looked for in every set
    "penguin": ["penguin"],
    "car": ["automobile"],
    "frog": ["frog"],
    "apple": ["red-apple", "green-apple"],
    "teddy bear": ["teddy-bear"],
    "house": ["house"],
    "rocket": ["rocket"],
    "mushroom": ["mushroom", "brown-mushroom"],
}
# Drawings that the training never sees, the subjects of demonstrations and tests: name -> class, set, icon.
# The last three are of another shape than all that the training knows of their class.
HELD_OUT = {
    "penguin": ("penguin", "noto-v1", "penguin"),
    "car": ("car", "noto-v1", "automobile"),
    "house": ("house", "noto-v1", "house"),
    "racer": ("car", "noto", "racing-car"),
    "hut": ("house", "fluent-emoji-flat", "hut"),
    "school": ("house", "fluent-emoji-flat", "school"),
}
SIZE = 128


def install(folder: Path) -> None:
    """Fetch the icon packages into `folder`, once."""
    missing = [
        name
        for key, (name, _) in PACKAGES.items()
        if not (folder / "node_modules/@iconify-json" / key).exists()
    ]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-save", "--prefix", str(folder), *missing], check=True)


def render(icons: dict, name: str) -> np.ndarray | None:
    """One icon as (SIZE, SIZE, 4) uint8, cropped to its ink and centred; None where the set lacks it."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    if name not in icons["icons"]:
        return None
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{2 * SIZE}" height="{2 * SIZE}">{icon["body"]}</svg>'
    )
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = (SIZE - 4) / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return np.asarray(canvas)


def load(folder: Path) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """(class -> drawings to train on, subject -> the held-out drawing), from the packages in `folder`."""
    install(folder)
    training: dict[str, list[np.ndarray]] = {word: [] for word in CLASSES}
    held_out: dict[str, np.ndarray] = {}
    for key in PACKAGES:
        icons = json.loads((folder / "node_modules/@iconify-json" / key / "icons.json").read_text())
        for subject, (_, its_set, name) in HELD_OUT.items():
            if key == its_set:
                held_out[subject] = render(icons, name)
        kept = {name for _, its_set, name in HELD_OUT.values() if key == its_set}
        for word, names in CLASSES.items():
            for name in names:
                drawing = None if name in kept else render(icons, name)
                if drawing is not None and not any(np.array_equal(drawing, its) for its in training[word]):
                    training[word].append(drawing)
    return training, held_out
