"""LoRA from the command line: training in one process and in two, what it leaves, drawing with it."""

import json

import merge_lora
import numpy as np
import pytest
from commands import run, train_arguments
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from test_ranks import STEPS, train_with_two

from ldm.weights.lora_merge import OWN_METADATA

LORA = ("--use_lora", "--lora_rank=3", "--lora_fp16=False", "--use_ema=True", "--lora_alpha=6",
        "--text_encoder_stop=None")  # fmt: skip
NAME = "dreambooth_lora_epoch_2.safetensors"


@pytest.fixture(scope="module")
def one(place):
    """One process with the global batch."""
    done = run(place, *train_arguments(), *STEPS, *LORA, "--train_batch_size=4", "--output_path=one")
    return place / "one", done.stderr


def test_training_leaves_the_additions_alone(place, one):
    folder, said = one
    names = {f"dreambooth_lora_epoch_{n}{ending}.safetensors" for n in (1, 2) for ending in ("", "_ema")}
    assert {path.name for path in folder.iterdir()} == names | {
        "effective_config.json", "metrics.jsonl", "report.html", "train.log", "checkpoints.sha256", ".lock",
        "run.json", "states",
    }  # fmt: skip
    assert (folder / NAME).stat().st_size < (place / "models/base.ckpt").stat().st_size / 20
    assert "LoRA: 16 additions of rank 3" in said
    assert "--ckpt_path models/base.ckpt --lora_ckpt_path one/dreambooth_lora_epoch_2_ema.safetensors" in said
    used = json.loads((folder / "effective_config.json").read_text())["options"]
    assert (used["lora_rank"], used["lora_alpha"], used["lora_targets"]) == (3, 6.0, "attention")
    with safe_open(folder / NAME, "np") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert {key.rsplit(".lora", 1)[0].removesuffix(".alpha").split("_")[1] for key in keys} == {"unet", "te"}
    own = json.loads(metadata[OWN_METADATA])
    assert (own["instance_prompt"], own["class_prompt"]) == ("a sks dog", "a dog")
    assert (own["rank"], own["alpha"], own["prediction_type"]) == ("3", "6", "epsilon")
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_output_name"] == NAME[:-12]
    averages = load_file(folder / NAME.replace("2.", "2_ema."))
    assert any(not np.array_equal(values, averages[key]) for key, values in load_file(folder / NAME).items())


def test_two_processes_train_as_one(place, one):
    said = train_with_two(place, "mpirun", "two", *LORA)
    ours, theirs = (load_file(place / folder / NAME) for folder in ("one", "two"))
    first = load_file(place / "one/dreambooth_lora_epoch_1.safetensors")
    change = sum(np.square(ours[key].astype(float) - first[key]).sum() for key in ours)
    difference = sum(np.square(ours[key].astype(float) - theirs[key]).sum() for key in ours)
    print(f"relative L2 difference of the change {np.sqrt(difference / change):.1e}")
    assert change > 0 and np.sqrt(difference / change) < 1e-3
    assert said.count("saved two/dreambooth_lora_epoch_1.safetensors") == 1


def test_a_run_is_continued_as_it_was_begun(place, one):
    """All is done; with another rank it would be another training; a folder with results is kept."""
    arguments = [*train_arguments(), *STEPS, *LORA, "--train_batch_size=4", "--output_path=one"]
    assert "nothing to do" in run(place, *arguments, "--resume=latest").stderr
    assert "lora_rank 3 -> 4" in run(place, *arguments, "--resume=latest", "--lora_rank=4", status=2).stderr
    assert "holds" in run(place, *arguments, status=2).stderr
    state = max((place / "one/states").iterdir())
    script = ROOT / "scripts/weights_of_state.py"
    said = run(place, str(state), "models/base.ckpt", "x.ckpt", script=script, status=2).stderr
    assert "is of a LoRA training" in said and not (place / "x.ckpt").exists()


def draw(place, folder, *extra, status=0):
    done = run(
        place, "--config=model.yaml", "--n_samples=1", "--n_iter=1", "--sampling_steps=2", "--ddim",
        f"--output_path={folder}", *extra, script=ROOT / "text_to_image.py", status=status,
    )  # fmt: skip
    if status:
        return done.stderr
    return np.asarray(Image.open(place / folder / "samples/00000.png")).astype(int)


def test_drawing_with_it(place, one):
    """As with the model that it is merged into, strengthened so that it is seen; without, as the base."""
    file, base = place / "one" / NAME, "--ckpt_path=models/base.ckpt"
    merge_lora.main([str(place / "models/base.ckpt"), f"{file}:30", str(place / "merged.safetensors"),
                     f"--config={place / 'model.yaml'}"])  # fmt: skip
    plain = draw(place, "plain", base, f"--lora_ckpt_path={file}", "--use_lora=False")
    added = draw(place, "added", base, "--lora_ckpt_path", f"{file}:10", f"{file}:20", "--lora_rank=3")
    merged = draw(place, "merged", "--ckpt_path=merged.safetensors")
    assert np.abs(added - plain).max() > 5 and np.abs(added - merged).max() <= 1
    assert "give the LoRA with --lora_ckpt_path" in draw(place, "x", base, "--use_lora", status=2)
    said = draw(place, "x", f"--ckpt_path={file}", status=2)
    assert "these are LoRA weights" in said and "--lora_ckpt_path" in said
    assert "no such file" in draw(place, "x", base, "--lora_ckpt_path=nowhere.safetensors", status=2)
