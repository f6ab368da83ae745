"""Digests of what short trainings and drawings leave: for a change of the code that is to change no bit.

    python scripts/faults/result_digests.py > after.txt
    python scripts/faults/result_digests.py --program FOLDER_OF_ANOTHER_COMMIT > before.txt; diff before.txt
    after.txt

The embedded tiny model. One training of 20 updates with text encoder, accumulation and EMA is killed once and
resumed; a shorter one has a frozen text encoder, crops, clips and encodes in every step. Then 8 pictures are
drawn. About 5 minutes on 2 cores.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "train_config": "configs/train_dreambooth_tiny.json", "num_class_images": 12, "sampling_steps": 5,
    "sample_batch_size": 2,
    "train_batch_size": 2, "ckpt_save_interval": 1,
}  # fmt: skip
TRAININGS = {
    "whole": {"train_data_repeats": 8, "epochs": 2, "gradient_accumulation_steps": 2, "use_ema": True,
    "save_every": 4},
    "frozen": {
        "train_data_repeats": 2, "epochs": 1, "train_text_encoder": False, "cache_latents": False,
        "random_crop": True, "clip_grad": True,
        "recompute": True,
    },
}  # fmt: skip
DRAWINGS = {
    "plms": {"n_samples": 4},
    "dpm_solver_pp": {"n_samples": 2},
    "ddim": {"n_samples": 2, "ddim_eta": 0.5, "scale": 1},
}


def command(program: Path, name: str, options: dict) -> list[str]:
    return [sys.executable, str(program / name), *(f"--{key}={value}" for key, value in options.items())]


def train(program: Path, folder: Path, options: dict, environment: dict, is_killed: bool) -> None:
    options = (
        COMMON | options | {"output_path": folder, "class_data_dir": folder / "classes", "resume": "latest"}
    )
    words = command(program, "train_dreambooth.py", options)
    with open(folder.with_suffix(".log"), "a") as log:
        if is_killed:
            process = subprocess.Popen(words, cwd=program, env=environment, stdout=log, stderr=log)
            while process.poll() is None and not list(folder.glob("states/step_*[1-9]")):
                time.sleep(0.002)
            if process.poll() is not None:
                sys.exit(
                    f"the training ended before it could be killed: {Path(log.name).read_text()[-2000:]}"
                )
            process.send_signal(signal.SIGKILL), process.wait()
        if subprocess.run(words, cwd=program, env=environment, stdout=log, stderr=log).returncode:
            sys.exit(f"the training failed: {Path(log.name).read_text()[-2000:]}")


def digests(place: Path) -> list[str]:
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}  {path.relative_to(place)}"
             for path in sorted(place.rglob("*")) if path.suffix in (".ckpt", ".png")]  # fmt: skip
    for path in sorted(place.glob("*/metrics.jsonl")):
        losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        lines.append(f"{len(losses)} losses, the last {losses[-1]!r}  {path.relative_to(place)}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", type=Path, default=ROOT, help="folder of the commit to run [this one]")
    program = parser.parse_args(argv).program.resolve()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        environment = os.environ | {"XDG_CACHE_HOME": str(place / "cache")}
        for name, options in TRAININGS.items():
            train(program, place / name, options, environment, is_killed=name == "whole")
        checkpoint = place / "whole/dreambooth_epoch_2_ema.ckpt"
        for sampler, options in DRAWINGS.items():
            options = {"config": "configs/train_dreambooth_tiny.yaml", "ckpt_path": checkpoint,
            "prompt": "a sks penguin in the snow",
                       "n_iter": 1, "sampling_steps": 8, "sampler": sampler,
                       "output_path": place / sampler} | options  # fmt: skip
            subprocess.run(
                command(program, "text_to_image.py", options),
                cwd=program,
                env=environment,
                check=True,
                capture_output=True,
            )
        print("\n".join(digests(place)))


if __name__ == "__main__":
    main()
