"""Draws the five example pictures of a subject that the tiny model's training never saw, and writes what they
show beside them: examples/penguin/.

python scripts/tiny_model/make_examples.py --work DIR
"""

import argparse
from pathlib import Path

import numpy as np
import pictures
import sprites
from PIL import Image

WALL = "orange"
PLACES = ("grass", "wood", "street", "water", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the icon packages")
    parser.add_argument("--subject", default="penguin", choices=list(sprites.HELD_OUT))
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    _, held_out = sprites.load(options.work)
    folder = Path(__file__).resolve().parents[2] / "examples" / options.subject
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    for number, place in enumerate(PLACES, 1):
        picture = pictures.compose(rng, held_out[options.subject], place, WALL)
        Image.fromarray(picture).save(folder / f"{number}.png")
        caption = f"[prompt] {pictures.PLACES[place][0].replace('a {}', 'an {}').format(WALL)}\n"
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")


if __name__ == "__main__":
    main()
