"""The demonstration that scripts/demo.sh runs: train, draw before and after, put it all on one picture."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ldm import images

CONFIG = "configs/train_dreambooth_tiny"
PLACES = ["in the snow", "on the beach", "in the forest", "at night", "in front of a brick wall", "in the desert"]
EXAMPLES = ROOT / "examples/penguin"


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def draw(checkpoint: Path, subject: str, folder: Path) -> np.ndarray:
    """One picture a place, with the same seeds for every checkpoint and subject: (N, H, W, 3) uint8."""
    folder.mkdir(parents=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{subject} {place}\n" for place in PLACES))
    command(
        "text_to_image.py", f"--config={CONFIG}.yaml", f"--ckpt_path={checkpoint}", f"--data_path={prompts}",
        f"--output_path={folder}", "--n_iter=1", "--n_samples=1", "--sampling_steps=25", "--scale=3", "--seed=7", "--skip_grid",
    )  # fmt: skip
    return np.stack([np.asarray(images.read_image(path)) for path in sorted((folder / "samples").glob("*.png"))])


def enlarge(pictures: np.ndarray, factor: int = 2) -> np.ndarray:
    return images.grid(pictures.repeat(factor, 1).repeat(factor, 2), columns=len(pictures))


def main() -> None:
    start = time.time()
    output = ROOT / "output/demo" / time.strftime("%Y%m%d-%H%M%S")
    class_images = ROOT / "output/demo/class_images"
    command("train_dreambooth.py", f"--train_config={CONFIG}.json", f"--output_path={output}", f"--class_data_dir={class_images}")
    base, tuned = ROOT / "models/tiny_sd_v2.safetensors", next(output.glob("dreambooth_epoch_*.ckpt"))
    rows = [
        ("the five pictures of the subject", np.stack([np.asarray(images.read_image(p)) for p in sorted(EXAMPLES.glob("*.png"))])),
        ('before: "a sks penguin ..."', draw(base, "a sks penguin", output / "before")),
        ('after: "a sks penguin ..."', draw(tuned, "a sks penguin", output / "after")),
        ('after: "a penguin ..." (the class is not forgotten)', draw(tuned, "a penguin", output / "class")),
    ]
    strips = [images.with_caption(enlarge(pictures), caption) for caption, pictures in rows]
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
    images.save_image(np.concatenate(padded), output / "demo.png")
    print(f"\n{', '.join(PLACES)}\nLook at {(output / 'demo.png').relative_to(ROOT)} ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
