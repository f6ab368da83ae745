"""What `scripts/bench/bench.py --ranks N` measures: N processes with one core each against one process with
one core.

The embedded tiny model with text encoder, by train_dreambooth.py under mpirun; each process has 4 instance
and 4 class pictures a batch. Timed are the updates after the first ones, so neither class pictures nor
latents nor compiling.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/train_dreambooth_tiny"
UPDATES, LEFT_OUT = 20, 2  # the first ones compile


def mpirun(ranks: int) -> list[str]:
    """The first words of a command of several processes."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        sys.exit("error: mpirun is not there: pip install -r requirements-test.txt")
    return [found, "-n", str(ranks), "--oversubscribe", *["--allow-run-as-root"] * (os.getuid() == 0)]


def seconds_an_update(ranks: int, accumulation: int, place: Path) -> float:
    """Median over the updates of a run, from the pictures a second that it reports."""
    output = place / f"output-{ranks}-{accumulation}"
    options = {
        "train_config": CONFIG.with_suffix(".json"), "model_config": CONFIG.with_suffix(".yaml"),
        "pretrained_model_path": ROOT / "models",
        "instance_data_dir": ROOT / "examples/penguin", "class_data_dir": place / "class",
        "num_class_images": 8, "sampling_steps": 2,
        "train_data_repeats": 4 * ranks * accumulation * UPDATES // 5, "epochs": 1,
        "gradient_accumulation_steps": accumulation,
        "output_path": output, "use_parallel": ranks > 1, "callback_size": 1000,
    }  # fmt: skip
    script = [
        sys.executable,
        str(ROOT / "train_dreambooth.py"),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    command = ["taskset", "-c", "0", *script]
    if ranks > 1:
        pinned = ["bash", "-c", 'exec taskset -c "$OMPI_COMM_WORLD_LOCAL_RANK" "$@"', "rank", *script]
        command = [*mpirun(ranks), "--bind-to", "none", *pinned]
    subprocess.run(
        command,
        env=os.environ | {"XDG_CACHE_HOME": str(place / "cache")},
        check=True,
        stderr=subprocess.DEVNULL,
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    pictures = 8 * ranks * accumulation
    # since the end of the first update
    times = [pictures * (row["global_step"] - 1) / row["images_per_second"] for row in rows[1:]]
    return median(b - a for a, b in zip(times[LEFT_OUT - 1 :], times[LEFT_OUT:]))


def figures(ranks: int):
    """Rows of bench.py: `ours` N processes, `peer` one; the ratio is of pictures a second, N would be
    perfect.
    """
    with tempfile.TemporaryDirectory() as folder:
        for accumulation in (1, 4):
            several, one = (seconds_an_update(count, accumulation, Path(folder)) for count in (ranks, 1))
            speeds = [8 * accumulation * count / seconds for count, seconds in ((ranks, several), (1, one))]
            name = f"ranks_{ranks}_accumulation_{accumulation}"
            yield {
                "name": name,
                "ours": speeds[0],
                "peer": speeds[1],
                "ratio": speeds[0] / speeds[1],
                "unit": "pictures/s",
            }
