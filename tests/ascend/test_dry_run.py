"""The program compiled for an Ascend and run dry, with stub libraries in CANN's place: scripts/dry_run.

Nothing is computed here. What is shown: every operator of every graph has a kernel for the device, which
kernels those are, how often they are launched, and that the commands go through from beginning to end.
"""

import json
import subprocess
import sys
from functools import lru_cache

import pytest
from commands import environment as users_environment
from commands import train_arguments
from conftest import ROOT
from dry_run import environment, run_counted

SMALL = "tests/ascend/small.yaml"
# CANN's old kernels, dear to launch; each a few times a step at most
OLD_IN_STEP = {
    "Gather", "UnsortedSegmentSum", "StridedSlice", "StridedSliceGrad", "ReduceMean", "RealDiv", "Stack",
    "TensorMove",
}  # fmt: skip
OLD_ELSEWHERE = {"Gather", "Split", "StridedSlice"}
FUSED = ("FlashAttentionScore", "FlashAttentionScoreGrad")
UNET_ATTENTIONS, TEXT_LAYERS = 2, 2  # of the small model; two attentions a transformer
VARIANTS = {
    "float16": ["--precision=float16"],
    "float16, all options": ["--precision=float16", "--gradient_accumulation_steps=2", "--clip_grad=True",
        "--use_ema=True", "--recompute=True", "--optim=adam"],
    "bfloat16, frozen text encoder": ["--precision=bfloat16", "--train_text_encoder=False",
        "--clip_grad=True"],
    "float32": ["--precision=float32"],
    "float16, LoRA": ["--precision=float16", "--use_lora=True", "--lora_alpha=8", "--recompute=True",
        "--lora_targets=+feed_forward+projections+convolutions"],
    "float16, adafactor": ["--precision=float16", "--optim=adafactor", "--min_snr_gamma=5"],
    "float16, lion, a text encoder of its own rate": ["--precision=float16", "--optim=lion",
        "--text_encoder_learning_rate=1e-6"],
    "float16, prodigy, a word of a frozen text encoder": ["--precision=float16", "--optim=prodigy",
        "--start_learning_rate=1", "--train_token=sks", "--train_text_encoder=False", "--masked_loss=True"],
    "float16, attention not fused": ["--precision=float16", "--flash_attention=off"],
}  # fmt: skip


@lru_cache
def step(*flags: str) -> dict:
    """What scripts/dry_run/training_step.py finds out."""
    command = [
        sys.executable,
        "scripts/dry_run/training_step.py",
        "--json",
        f"--model_config={SMALL}",
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def launched(found: dict, kind: str) -> set[str]:
    return {name for name in found["launches"] if found["kinds"].get(name) == kind}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_a_training_step_has_a_kernel_for_everything(flags):
    found = step(*flags)
    assert not found["on_cpu"]
    is_fused = "--precision=float32" not in flags and "--flash_attention=off" not in flags
    assert launched(found, "aclop") <= OLD_IN_STEP | (set() if is_fused else {"ReduceSum"})
    old = sum(found["launches"][name] for name in launched(found, "aclop"))
    print(f"{sum(found['launches'].values()):g} launches an update, {old:g} of old kernels")
    # what Prodigy keeps is read, then written: TensorMove, of three arrays for each that is trained
    assert old <= (150 if "--optim=prodigy" in flags else 60)
    passes = 2 if "--gradient_accumulation_steps=2" in flags else 1
    trains_text = "--train_text_encoder=False" not in flags or "--train_token=sks" in flags
    attentions = UNET_ATTENTIONS + TEXT_LAYERS * trains_text
    for name in FUSED:
        assert found["launches"].get(name, 0) == (attentions * passes if is_fused else 0)
    assert found["launches"].get("AllFinite", 0) == ("--precision=float16" in flags)


def test_an_update_of_two_ranks_exchanges_joined_gradients_the_overflow_and_the_losses():
    alone, two = step("--precision=float16"), step("--precision=float16", "--ranks=2")
    arrays = alone["launches"]["AdamW"]
    assert two["launches"]["AllReduce"] == arrays + 2
    assert two["kinds"]["AllReduce"] == "hccl" and not two["on_cpu"]


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_the_networks_have_a_kernel_for_everything(precision):
    graphs = ["encode", "decode", "text", "guided"]
    done, kernels = run_counted([str(ROOT / "tests/ascend/graphs.py"), precision, *graphs], timeout=300)
    assert [line.split()[0] for line in done.stdout.splitlines() if "compiled" in line] == graphs, done.stderr
    assert not kernels.on_cpu
    old = {name for name in kernels.launches if kernels.kinds.get(name) == "aclop"}
    assert old <= OLD_ELSEWHERE
    # weights are cast once, when they are loaded: what is left are norms
    assert kernels.launches.get("Cast", 0) <= (100 if precision == "float16" else 2)
    # of the VAE's one attention none, for its head is too wide
    is_half = precision == "float16"
    assert kernels.launches.get("FlashAttentionScore", 0) == (UNET_ATTENTIONS + TEXT_LAYERS) * is_half


GRAPHS = ("step", "check", "apply_collected", "guided", "text", "encode", "decode")


@pytest.mark.parametrize("graph", GRAPHS)
def test_on_the_first_910_every_operator_has_an_adapter(graph, tmp_path):
    """There a graph goes to CANN's graph engine as a whole: MindSpore turns each operator into one of those
    in a file. What comes after is CANN's, and ends in the stubs; an operator without one does not get there.
    """
    noted = tmp_path / "operators"
    variables = environment("Ascend910A", simulates=False, GE_OPERATORS=str(noted))
    command = [sys.executable, str(ROOT / "tests/ascend/graphs.py"), "float16", graph]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    lines = dict(
        line.split(":") for line in (ROOT / "tests/ascend/ge_operators.txt").read_text().splitlines()
    )
    operators = set(noted.read_text().split())
    print(" ".join(sorted(operators)))
    assert operators == set(lines[graph].split()), done.stderr[-2000:]


def dry_run(place, script, *arguments) -> str:
    given = environment(XDG_CACHE_HOME=users_environment(place)["XDG_CACHE_HOME"])
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=place, env=given, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_the_commands_run_through_and_leave_nothing_that_a_real_run_would_take(place, own_cache):
    flags = ["--save_state_minutes=0", "--validation_prompt=a sks dog", "--use_ema=True"]
    log = dry_run(place, "train_dreambooth.py", *train_arguments(), *flags)
    assert "on Ascend (ascend910b), precision float16" in log
    assert "a dry run, which computes nothing" in log and "OVERFLOW" not in log
    output = place / "output/dry_run"
    assert {path.name for path in (place / "output").iterdir()} == {"dry_run"}
    assert (output / "dreambooth_epoch_2.ckpt").exists() and list((output / "states").glob("step_*"))
    assert len(list((output / "class_images").glob("*.png"))) == 3 and not (place / "classes").exists()
    assert len(list((output / "validation").glob("step_*.png"))) == 3 and (output / "report.html").exists()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == rows[-1]["total_steps"] and not any(row["skipped"] for row in rows)
    drawn = dry_run(
        place, "text_to_image.py", "--config=model.yaml", "--ckpt_path=models/base.ckpt", "--n_samples=1",
        "--n_iter=1", "--sampling_steps=2", "--output_path=drawn",
    )  # fmt: skip
    assert "1 images in" in drawn and {path.name for path in (place / "drawn").iterdir()} == {"dry_run"}
    cache = place / "cache/dreambooth-mindspore"
    assert {path.name for path in cache.iterdir()} == {"dry_run"}
