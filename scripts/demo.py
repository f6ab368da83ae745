"""The demonstration that scripts/demo.sh runs: train, draw before and after, judge, put it all on one
picture.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/tiny_model")]
import evaluate_tiny
from drawer import BASE, CONFIG
from evaluation import NEW_PLACES, Evaluation

from ldm import images
from ldm.device import start_device
from ldm.image_files import read_image

SUBJECT = "penguin"
LOOK = [
    "--validation_prompt", f"a sks {SUBJECT} in the snow", f"a {SUBJECT} in the snow",
    "--validation_every=40", "--validation_guidance_scale=3",
]  # fmt: skip
EXAMPLES = ROOT / "examples" / SUBJECT


def enlarge(pictures: np.ndarray, factor: int = 2) -> np.ndarray:
    return images.grid(pictures.repeat(factor, 1).repeat(factor, 2), columns=len(pictures))


def main() -> None:
    start = time.time()
    output = ROOT / "output/demo" / time.strftime("%Y%m%d-%H%M%S")
    class_images = ROOT / "output/demo/class_images"
    options = [f"--train_config={CONFIG}.json", f"--output_path={output}", f"--class_data_dir={class_images}"]
    subprocess.run([sys.executable, "train_dreambooth.py", *options, *LOOK], cwd=ROOT, check=True)
    trained = time.time()
    print("drawing and judging: two minutes", flush=True)
    start_device("auto", mode=0)
    tuned = next(output.glob("dreambooth_epoch_*.ckpt"))
    evaluation = Evaluation(output / "sheets", each=1)
    before, after = (
        evaluation.draw_subject_in_new_places(checkpoint, SUBJECT) for checkpoint in (BASE, tuned)
    )
    by_class = evaluation.drawer(tuned, [f"a {SUBJECT} {place}" for place in NEW_PLACES], seed=2)
    base = evaluation.base_figures(SUBJECT)
    figures = {"base_subject": base["base_subject"]} | evaluation.figures_of(tuned, SUBJECT, base, SUBJECT)
    rows = [
        (
            "the five pictures of the subject",
            np.stack([np.asarray(read_image(p)) for p in sorted(EXAMPLES.glob("*.png"))]),
        ),
        ('before: "a sks penguin ..."', before[: len(NEW_PLACES)]),
        ('after: "a sks penguin ..."', after[: len(NEW_PLACES)]),
        ('after: "a penguin ..." (the class is not forgotten)', by_class),
    ]
    strips = [images.with_caption(enlarge(pictures), caption) for caption, pictures in rows]
    width = max(strip.shape[1] for strip in strips)
    padded = [
        np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips
    ]
    images.save_image(np.concatenate(padded), output / "demo.png")
    evaluate_tiny.show(
        "This run, judged by a network that never saw a drawn picture:",
        [evaluate_tiny.row(k, [v]) for k, v in figures.items()],
    )
    columns = ", ".join(NEW_PLACES)
    print(f"training {trained - start:.0f} s, all {time.time() - start:.0f} s; columns: {columns}")
    print(
        f"Look at {(output / 'demo.png').relative_to(ROOT)}, "
        f"{(output / 'sheets' / SUBJECT).relative_to(ROOT)}.png and, in a browser, "
        f"{(output / 'report.html').relative_to(ROOT)}"
    )
    print(
        f"Draw: .venv/bin/python text_to_image.py --config {CONFIG.relative_to(ROOT)}.yaml --ckpt_path "
        f"{tuned.relative_to(ROOT)} "
        '--ddim --sampling_steps 25 --scale 3 --prompt "a sks penguin on the street"'
    )


if __name__ == "__main__":
    main()
