"""Two processes against one: the same steps, the same pictures; and all of them end where one does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from bench_ranks import mpirun
from commands import environment, run, train_arguments, updates_done, wait_for
from conftest import ROOT, read_checkpoint
from kill_and_resume import processes_of

from ldm.ranks import Ranks, check_launch

BIN = os.path.dirname(sys.executable)
STEPS = (
    "--gradient_accumulation_steps=2", "--clip_grad=True", "--max_grad_norm=0.5", "--num_class_images=7",
    "--train_data_repeats=8",
    "--epochs=2", "--random_crop=True", "--start_learning_rate=1e-4", "--save_every=4",
    # recipes that act in each process; the text encoder is frozen after update 6
    "--min_snr_gamma=5", "--noise_offset=0.05", "--text_encoder_learning_rate=5e-5",
    "--text_encoder_stop=0.6", "--lr_schedule=cosine", "--caption_dropout=0.3",
)  # fmt: skip  # 40 samples an epoch, 8 an update: 10 updates


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(name: str, logs) -> list[str]:
    if name == "mpirun":
        return [*mpirun(2), sys.executable]
    return [
        f"{BIN}/msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}",
        f"--log_dir={logs}", "--join=True",
        "--cluster_time_out=120",
    ]  # fmt: skip


def command(place, name: str, folder: str, *extra) -> tuple[list[str], dict]:
    script = [
        str(ROOT / "train_dreambooth.py"),
        *train_arguments(),
        *STEPS,
        f"--output_path={folder}",
        *extra,
    ]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return [*launcher(name, place / f"{folder}-logs"), *script], environment(place) | {
        "PATH": path,
        "MS_NODE_TIMEOUT": "10",
    }


def train_with_two(place, name: str, folder: str, *extra, status=0) -> str:
    words, variables = command(place, name, folder, "--use_parallel=True", "--train_batch_size=2", *extra)
    done = subprocess.run(words, cwd=place, env=variables, capture_output=True, text=True, timeout=600)
    logs = "".join(path.read_text() for path in sorted((place / f"{folder}-logs").glob("worker*.log")))
    assert (done.returncode != 0) == (status != 0), done.stderr[-3000:] + logs[-3000:]
    return done.stdout + done.stderr + logs


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder, name):
    return np.array([json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def assert_same_training(place, one, two):
    """Losses within 1e-5, the change of the weights within 1e-3 in relative L2: sums over a batch in another
    order, nothing more.
    """
    assert np.allclose(rows(one, "loss"), rows(two, "loss"), rtol=1e-5, atol=0)
    assert np.allclose(rows(one, "gradient_norm"), rows(two, "gradient_norm"), rtol=1e-4)
    base = read_checkpoint(place / "models/base.ckpt")
    ours, theirs = (read_checkpoint(folder / "dreambooth_epoch_2.ckpt") for folder in (one, two))
    change = difference = 0.0
    for name in base:
        change += np.square(ours[name].astype(np.float64) - base[name]).sum()
        difference += np.square(ours[name].astype(np.float64) - theirs[name]).sum()
    print(f"relative L2 difference of the change {np.sqrt(difference / change):.1e}")
    assert change > 0 and np.sqrt(difference / change) < 1e-3


@pytest.fixture(scope="module")
def one(place, own_cache):
    """One process with the global batch."""
    run(place, *train_arguments(), *STEPS, "--train_batch_size=4", "--output_path=one")
    return place / "one"


@pytest.fixture(scope="module")
def two(place, one):
    """Two processes under mpirun, from the class pictures on: what they said, and the class pictures of
    `one`.
    """
    drawn = files(place / "classes/dog")
    shutil.move(place / "classes", place / "classes of one")
    shutil.rmtree(place / "cache/dreambooth-mindspore/latents")
    seen = ["--validation_prompt", "a sks dog", "--validation_images=1"]
    return train_with_two(place, "mpirun", "two", *seen), drawn


def test_two_under_mpirun_train_as_one(place, one, two):
    """From class pictures to weights.

    That both ranks' weights are the same bit by bit is checked at every checkpoint.
    """
    said, drawn = two
    assert sorted(drawn) == [*(f"class_{n:05d}.png" for n in range(7)), "drawn_from.json"]
    assert files(place / "classes/dog") == drawn
    assert_same_training(place, one, place / "two")
    assert said.count("saved two/dreambooth_epoch_1.ckpt") == 1 and "rank 1 INFO" not in said
    grids = [path.name for path in (place / "two/validation").iterdir()]  # of the first process alone
    assert len(grids) >= 3 and said.count("validation images of update") == len(grids)


def test_two_under_msrun_survive_a_kill(place, one, two):
    """SIGKILL of rank 1 in the middle: all end within 60 s.

    Resumed by two, the run ends with the bits of the one under mpirun that was
    never stopped; resumed by one process with the same global batch, as near as a run of one process is.
    """
    words, variables = command(place, "msrun", "killed", "--use_parallel=True", "--train_batch_size=2")
    process = subprocess.Popen(
        words, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: updates_done(place / "killed") >= 5, 400)
    start = time.monotonic()
    os.kill(processes_of("killed")[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode and time.monotonic() - start < 60
    wait_for(lambda: not processes_of("killed"), 60)
    shutil.copytree(place / "killed", place / "by one")
    # 4, or 5 if the first epoch's was just written
    done = max(int(path.name[5:]) for path in (place / "killed/states").glob("step_*"))
    train_with_two(place, "msrun", "killed", "--resume=latest")
    ours, theirs = (read_checkpoint(place / name / "dreambooth_epoch_2.ckpt") for name in ("killed", "two"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert_same_training(place, one, place / "killed")
    resumed = run(
        place, *train_arguments(), *STEPS, "--train_batch_size=4", "--output_path=by one", "--resume=latest"
    )
    assert (
        done in (4, 5)
        and f"resumed from by one/states/step_{done:08d}: {done} of 10 updates done" in resumed.stderr
    )
    assert_same_training(place, one, place / "by one")


def test_an_error_of_one_rank_ends_all_with_a_line_that_names_it(place, one):
    said = train_with_two(place, "mpirun", "failed", f"--instance_data_dir={place / 'one'}", status=2)
    assert (
        "train_dreambooth.py: rank 0: error: instance_data_dir" in said
        or "train_dreambooth.py: rank 1: error: instance_data_dir" in said
    )
    assert not processes_of("failed")


def run_with_two(script: str) -> tuple[list[dict], str]:
    """What the processes of a script in this folder print, and their log."""
    words = [*launcher("mpirun", None), str(ROOT / "tests" / script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in found) == [0, 1]
    return found, done.stderr


def test_what_an_ascend_may_do_to_two_processes_is_agreed_on():
    """An overflow that one of them alone is told of, and last bits of weights that differ."""
    found, log = run_with_two("ranks_on_an_ascend.py")
    assert all(row["skipped"] and row["mended"] for row in found)
    assert all("more than roundings do" in row["refused"] for row in found)
    assert "trained weights of rank 1 differ from rank 0's, by 1" in log


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    found, _ = run_with_two("overflow_on_one_rank.py")
    assert [row["skipped"] for row in found] == [[False, True, False, False]] * 2
    assert found[0]["scale"] == found[1]["scale"] == 256 and found[0]["digest"] == found[1]["digest"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_share_is_nobody_elses(size):
    items = list(range(7))
    assert sorted(item for rank in range(size) for item in Ranks(rank, size).share(items)) == items


LAUNCHED = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}


def test_option_and_launch_must_fit(monkeypatch, place):
    for name in ("MS_ROLE", "MS_WORKER_NUM", *LAUNCHED, "RANK_TABLE_FILE", "RANK_ID", "RANK_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_launch(False)
    error = run(place, *train_arguments(), "--use_parallel=True", status=2).stderr
    assert (
        error.startswith(
            "train_dreambooth.py: error: use_parallel=True, but nothing started several processes"
        )
        and error.count("\n") == 1
    )
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    check_launch(True)
    with pytest.raises(ValueError, match="mpirun started several processes: add --use_parallel=True"):
        check_launch(False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    check_launch(False)
    for name in LAUNCHED:
        monkeypatch.delenv(name)
    for name, value in {"RANK_TABLE_FILE": "table.json", "RANK_ID": "0", "RANK_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a rank table started several processes: add --use_parallel=True"):
        check_launch(False)
    monkeypatch.setenv("RANK_SIZE", "1")
    check_launch(False)


TRAINING = """#!{python}
import os, signal, sys, time
rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK_ID"]
def save(number, frame):
    time.sleep(2)  # longer than mpirun lets a process live after SIGTERM
    open(f"saved {{rank}}", "w")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save), signal.signal(signal.SIGINT, save)
assert sys.argv[1] == "train_dreambooth.py" and "--use_parallel=True" in sys.argv
assert "--output_path=two words/txt2img" in sys.argv
with open(f"started {{rank}}", "w") as file:
    file.write(os.environ.get("DEVICE_ID", "none"))
assert ("RANK_TABLE_FILE" in os.environ) == (os.environ["launcher"] == "rank_table")
if rank == os.environ.get("FAILS"):
    sys.exit(3)
time.sleep(float(os.environ["SECONDS_TO_TRAIN"]))
"""


@pytest.fixture
def launch(tmp_path):
    """Starts a copy of the launch script with a training that only sleeps."""
    (tmp_path / "scripts").mkdir()
    for name in ("run_train_dreambooth_distributed.sh", "run_train_dreambooth_sd_v2.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    python = tmp_path / "python"
    python.write_text(TRAINING.format(python=sys.executable)), python.chmod(0o755)

    def start(launcher, seconds, **variables):
        variables |= {
            "launcher": launcher, "RANK_SIZE": "2", "RANK_TABLE_FILE": "table.json", "PYTHON": str(python),
            "output_path": "two words",
            "mpirun_options": "--oversubscribe", "SECONDS_TO_TRAIN": str(seconds),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", "scripts/run_train_dreambooth_distributed.sh"], cwd=tmp_path, env=os.environ | variables,
            start_new_session=True,
            # a shell that was started to ignore it cannot trap it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started.append(process)
        return process

    started = []
    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("launcher", ["mpirun", "rank_table"])
def test_the_launch_script_ends_as_its_processes_do(launch, tmp_path, launcher):
    assert launch(launcher, 0).wait(60) == 0 and len(list(tmp_path.glob("started *"))) == 2
    assert launch(launcher, 100, FAILS="1").wait(60) == 3
    if launcher == "mpirun":  # MindSpore gives each process its device; in the environment all had the same
        assert (tmp_path / "started 1").read_text() == "none"
    if launcher == "rank_table":
        assert launch(launcher, 0, devices="4 6").wait(60) == 0
        assert [(tmp_path / f"started {rank}").read_text() for rank in (0, 1)] == ["4", "6"]
        for wrong in ({"devices": "4 5 6"}, {"RANKS_BEFORE": "2"}):
            assert launch(launcher, 0, **wrong).wait(60) == 2
    for path in tmp_path.glob("started *"):
        path.unlink()
    process = launch(launcher, 100)
    wait_for(lambda: len(list(tmp_path.glob("started *"))) == 2, 60)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C at a terminal does
    assert process.wait(60) == 130 and len(list(tmp_path.glob("saved *"))) == 2
