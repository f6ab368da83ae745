"""Running the commands as a user does, in a folder of their own: the fixture `place`."""

import os
import subprocess
import sys
import time

from conftest import ROOT


def environment(place) -> dict[str, str]:
    """With the cache that all tests share, where what one of them compiled is found by the next; or, where a
    folder `cache` is made first, with an empty one.
    """
    clean = {name: value for name, value in os.environ.items() if name != "MS_COMPILER_CACHE_PATH"}
    own = place / "cache"
    return clean | ({"XDG_CACHE_HOME": str(own)} if own.is_dir() else {})


def run(place, *arguments, status=0, script=ROOT / "train_dreambooth.py", **variables):
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(
        command, cwd=place, env=environment(place) | variables, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done


def train_arguments() -> list[str]:
    return [
        "--train_config=train.yaml", "--model_config=model.yaml", "--pretrained_model_file=base.ckpt",
        "--epochs=2",
        "--instance_data_dir=my dog", "--instance_prompt=a sks dog", "--class_data_dir=classes/dog",
        "--class_prompt=a dog",
        "--num_class_images=3", "--train_batch_size=2", "--start_learning_rate=1e-4",
    ]  # fmt: skip


def train(place, *extra, status=0):
    return run(place, *train_arguments(), *extra, status=status)


def start(place, *extra, **options) -> subprocess.Popen:
    """A training that goes on while the test looks on."""
    arguments = [sys.executable, str(ROOT / "train_dreambooth.py"), *train_arguments(), *extra]
    return subprocess.Popen(
        arguments, cwd=place, env=environment(place), stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, seconds=200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def updates_done(folder) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0
