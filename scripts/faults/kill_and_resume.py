"""Kill a training with SIGKILL at many moments, resume it, and compare the end with that of a run that was
never stopped.

    python scripts/faults/kill_and_resume.py                     # 20 kills of one process, about 15 minutes
    python scripts/faults/kill_and_resume.py --ranks 2           # each moment in each of two processes under
    mpirun

The embedded tiny model with text encoder, accumulation and EMA. Moments are drawn from --seed over the length
of the uninterrupted run; some wait for what is seldom hit by chance: class pictures being drawn, latents
being encoded, a state or a checkpoint being written. Prints a table; exit status 1 where an end differs or a
half-written file is left.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from bench_ranks import mpirun
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/train_dreambooth_tiny"
MOMENTS = {  # what is looked for in the run's folder before the kill
    "class pictures": lambda run: len(list(run.glob("classes/*.png"))) in range(1, 12),
    "latents": lambda run: len(list(run.glob("cache/dreambooth-mindspore/latents/*"))) in range(1, 12),
    "writing a state": lambda run: any(run.glob("output/states/.step_*.part")),
    "writing a checkpoint": lambda run: any(run.glob("output/.dreambooth_epoch_*.part*")),
}


def processes_of(output: str | Path) -> list[int]:
    """The training processes that write to `output` at present, by rank; without launchers and msrun's
    scheduler.
    """
    found = []
    for entry in filter(lambda entry: entry.name.isdigit(), Path("/proc").iterdir()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if (
                words[1:2] == [str(ROOT / "train_dreambooth.py").encode()]
                and f"--output_path={output}".encode() in words
            ):
                variables = dict(
                    pair.split(b"=", 1)
                    for pair in (entry / "environ").read_bytes().split(b"\0")
                    if b"=" in pair
                )
                if variables.get(b"MS_ROLE", b"MS_WORKER") == b"MS_WORKER":
                    rank = variables.get(b"OMPI_COMM_WORLD_RANK", variables.get(b"RANK_ID", b"0"))
                    found.append((int(rank), int(entry.name)))
    return [number for _, number in sorted(found)]


class Run:
    """A training in a folder of its own; only compiled graphs are shared."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        folder.mkdir()
        self.environment = os.environ | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "MS_COMPILER_CACHE_PATH": str(folder.parent / "graphs"),
        }

    def start(self) -> subprocess.Popen:
        options = {
            "train_config": CONFIG.with_suffix(".json"), "model_config": CONFIG.with_suffix(".yaml"),
            "pretrained_model_path": ROOT / "models", "instance_data_dir": ROOT / "examples/penguin",
            "class_data_dir": self.folder / "classes", "output_path": self.folder / "output",
            "num_class_images": 12,
            "sampling_steps": 5, "sample_batch_size": 2, "train_data_repeats": 8, "epochs": 3,
            "train_batch_size": 2 // self.ranks,
            "gradient_accumulation_steps": 2, "use_ema": True, "save_every": 4, "ckpt_save_interval": 1,
            "resume": "latest",
            "use_parallel": self.ranks > 1,
        }  # fmt: skip
        command = [
            *(mpirun(self.ranks) if self.ranks > 1 else []),
            sys.executable,
            str(ROOT / "train_dreambooth.py"),
            *(f"--{k}={v}" for k, v in options.items()),
        ]
        log = open(self.folder / "log.txt", "a")
        return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def processes(self) -> list[int]:
        return processes_of(self.folder / "output")

    def result(self) -> str:
        """A digest over the last checkpoints' and the class pictures' contents."""
        digest = hashlib.sha256()
        for path in [
            *sorted(self.folder.glob("output/dreambooth_epoch_*.ckpt")),
            *sorted(self.folder.glob("classes/*")),
        ]:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def litter(self) -> list[Path]:
        return [path for path in self.folder.rglob(".*") if path.name != ".lock"]


def kill(run: Run, when: Callable[[], bool], victim: int) -> tuple[float, float, str]:
    """Start, wait for the moment, kill one process; seconds until then, seconds until all had ended, and what
    was done by then.

    Raises TooLate where the run had ended before.
    """
    process, start = run.start(), time.monotonic()
    try:
        while process.poll() is None and not when():
            time.sleep(0.001)
        moment = time.monotonic() - start
        metrics = run.folder / "output/metrics.jsonl"
        done = f"{len(metrics.read_text().splitlines())} updates" if metrics.exists() else "before training"
        numbers = run.processes()
        if process.poll():
            sys.exit(f"a run failed before it was killed: {(run.folder / 'log.txt').read_text()[-2000:]}")
        if process.poll() is not None or len(numbers) < run.ranks:
            raise TooLate
        os.kill(numbers[victim], signal.SIGKILL)
        process.wait(timeout=60)
        while run.processes():
            if time.monotonic() - start - moment > 60:
                raise TimeoutError(f"{run.folder}: processes are left 60 s after the kill")
            time.sleep(0.05)
        return moment, time.monotonic() - start - moment, done
    finally:
        process.kill()  # the launcher first, which could start more of them
        process.wait()
        while numbers := run.processes():
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


class TooLate(Exception):
    """The run was not there to be killed, or not yet."""


def after(seconds: float) -> Callable[[], bool]:
    start = time.monotonic()
    return lambda: time.monotonic() - start > seconds


def seen(sign: Callable[[Path], bool], folder: Path) -> Callable[[], bool]:
    return lambda: sign(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, help="how many [20; with several processes each moment in each rank]"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes that train together [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    plan = [(name, rank) for name in ("at random", *MOMENTS) for rank in range(options.ranks)]
    if options.ranks == 1:  # every second one at random
        plan = [(name, 0) for moment in MOMENTS for name in ("at random", moment)]
    kills, failures = options.kills or max(20 if options.ranks == 1 else 0, len(plan)), 0
    print(
        "| kill | rank | moment | s after the start | done by then | s until all had ended | end "
        "|\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        for warm in ("first", "whole"):  # the second finds its graphs compiled, as the runs to be killed will
            whole, start = Run(Path(place, warm), options.ranks), time.monotonic()
            if whole.start().wait():
                sys.exit(f"the uninterrupted run failed: {(whole.folder / 'log.txt').read_text()[-2000:]}")
            length = time.monotonic() - start
        for number in tqdm(range(kills), "kills", disable=None):
            name, victim = plan[number % len(plan)]
            for _ in range(10):
                run = Run(Path(place, str(number)), options.ranks)
                when = (
                    after(rng.uniform(1, length)) if name == "at random" else seen(MOMENTS[name], run.folder)
                )
                try:
                    moment, ended, done = kill(run, when, victim)
                    break
                except (TooLate, ProcessLookupError):  # once more
                    shutil.rmtree(run.folder)
            else:
                sys.exit(f"{name}: not seen in ten runs")
            status = run.start().wait()
            equal = status == 0 and run.result() == whole.result() and not run.litter()
            failures += not equal
            verdict = (
                "equal" if equal else f"DIFFERS (status {status}, left {[p.name for p in run.litter()]})"
            )
            tqdm.write(
                f"| {number + 1} | {victim} | {name} | {moment:.1f} | {done} | {ended:.1f} | {verdict} |"
            )
            sys.stdout.flush()
            shutil.rmtree(run.folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
