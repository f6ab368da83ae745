"""scripts/evaluate.py on a small random model with random judges; the protocol's lists and sums."""

import json

import numpy as np
import pytest
from commands import run, train
from conftest import ROOT, write_pictures
from judges import save_clip, save_dino

from ldm.evaluation import protocol
from ldm.evaluation.judges import ClipJudge, DinoJudge
from ldm.image_files import read_image
from ldm.values import ConfigError

SCRIPT = ROOT / "scripts/evaluate.py"


def test_the_papers_prompts():
    objects, living = (protocol.read_templates(kind, ROOT) for kind in ("objects", "living"))
    assert len(objects) == len(living) == 25 and objects[:10] == living[:10] and objects[20:] == living[20:]
    assert not set(objects[10:20]) & set(living[10:20])
    assert objects[13] == "a {} floating on top of water" and living[12] == "a {} wearing a rainbow scarf"


def test_similarities():
    a = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    assert np.isclose(protocol.similarity(a[:1], a), (1 + 0 + 0.6) / 3)
    assert np.isclose(protocol.among(a), (0 + 0.6 + 0.8) / 3) and np.isnan(protocol.among(a[:1]))
    assert protocol.pairs_of(3) == [(0, 1), (0, 2), (1, 2)]
    rows = {"a": {"dino": 0.5, "pres": 0.4}, "b": {"dino": 0.6, "pres": 0.3}, "paper": {"dino": 0.9}}
    assert protocol.table(rows, ["a", "b"]).splitlines() == [
        "| | DINO ↑ | PRES ↓ |", "|---|---|---|", "| a | 0.500 | 0.400 |", "| b | **0.600** | **0.300** |",
        "| paper | 0.900 | – |",
    ]  # fmt: skip


def test_rows_and_labels(tmp_path):
    results = {
        "dog": {"real images": {"dino": 0.7}, "epoch_6": {"dino": 0.5}},
        "cat": {"real images": {"dino": 0.9}, "epoch_8": {"dino": 0.7}},
    }
    assert protocol.rows_of(results) == {"real images": {"dino": 0.8}, "checkpoint 1": {"dino": 0.6}}
    assert protocol.finite({"a": {"b": float("nan"), "c": 1.0}}) == {"a": {"b": None, "c": 1.0}}
    names = ["x_v1.4", "x_v1.5", "a/y.ckpt", "b/y.ckpt"]
    assert list(protocol.labels_of([tmp_path / name for name in names])) == ["x_v1.4", "x_v1.5", "a_y", "b_y"]
    both = [tmp_path / "e.ckpt", tmp_path / "e.safetensors"]
    assert list(protocol.labels_of(both)) == ["e.ckpt", "e.safetensors"]


@pytest.mark.parametrize("change, wanted", [
    ({"subject": ""}, "here: subject is missing"),
    ({"sujbect": "x"}, "unknown key sujbect; did you mean subject?"),
    ({"class_word": "cat"}, "subject 'sks dog' must have the class_word 'cat' in it"),
    ({"ckpt_path": ["none.ckpt"]}, "ckpt_path none.ckpt: no such file"),
    ({"name": "../x"}, "name must be one to call a folder by"),
    ({"prompts": "none.txt"}, "prompts must be objects, living or a file, got none.txt"),
])  # fmt: skip
def test_mistakes_in_a_case(tmp_path, change, wanted):
    (tmp_path / "a.ckpt").touch()
    write_pictures(tmp_path, 1)
    good = {"instance_data_dir": str(tmp_path), "subject": "sks dog", "class_word": "dog"}
    good |= {"ckpt_path": [str(tmp_path / "a.ckpt")]}
    assert protocol.case_of(good, ROOT, "here").checkpoints == {"a": tmp_path / "a.ckpt"}
    with pytest.raises(ConfigError) as error:
        protocol.case_of(good | change, ROOT, "here")
    assert wanted in str(error.value)


def test_checkpoints_and_lora_side_by_side(place):
    """Two epochs of a LoRA, one of two subjects; stopped and gone on with; figures by hand."""
    train(place, "--output_path=out", "--use_lora=True", "--start_learning_rate=1e-2")
    save_clip(place / "clip")
    save_dino(place / "dino")
    write_pictures(place / "cat", 2, seed=9)
    (place / "two.txt").write_text("a {} in the snow\na red {}\n")
    subjects = [
        {"instance_data_dir": "my dog", "subject": "sks dog", "class_word": "dog", "prompts": "two.txt"},
        {"instance_data_dir": "cat", "subject": "sks cat", "class_word": "cat", "prompts": "two.txt"},
    ]
    checkpoints = [f"out/dreambooth_lora_epoch_{n}.safetensors" for n in (1, 2)]
    for subject in subjects:
        subject["ckpt_path"] = checkpoints
    (place / "subjects.json").write_text(json.dumps({"subjects": subjects}))
    arguments = [
        "--subjects=subjects.json", "--base_path=models/base.ckpt", "--config=model.yaml", "--dino=dino",
        "--clip=clip", "--n_samples=2", "--prior_images=3", "--steps=2", "--output_path=judged",
    ]  # fmt: skip
    done = run(place, *arguments, script=SCRIPT)
    images = {path: path.stat().st_mtime_ns for path in (place / "judged/images").rglob("*.png")}
    assert len(images) == 2 * 2 * (2 * 2 + 3) and "7 of 7 images to be drawn" in done.stderr
    found = json.loads((place / "judged/results.json").read_text())
    label = "dreambooth_lora_epoch_2"
    assert list(found["mean"]) == ["real images", "dreambooth_lora_epoch_1", label]
    assert (
        f"| {label} | " in done.stdout
        and "| the paper: DreamBooth, Stable Diffusion | 0.668 |" in done.stdout
    )
    # one figure of each kind once more
    dino, clip = DinoJudge(place / "dino"), ClipJudge(place / "clip")
    folder, its = place / "judged/images/my dog" / label, found["subjects"]["my dog"][label]
    drawn = [read_image(folder / f"p01_00{n}.png") for n in range(2)]
    real = [read_image(path) for path in sorted((place / "my dog").iterdir())]
    prompt = its["prompts"]["a {} in the snow"]
    assert np.isclose(prompt["dino"], (dino.images(drawn) @ dino.images(real).T).mean(), atol=1e-5)
    assert np.isclose(prompt["clip_i"], (clip.images(drawn) @ clip.images(real).T).mean(), atol=1e-5)
    said = clip.texts(["a dog in the snow"])[0]
    assert np.isclose(prompt["clip_t"], (clip.images(drawn) @ said).mean(), atol=1e-5)
    prior = [read_image(folder / f"class_00{n}.png") for n in range(3)]
    assert np.isclose(its["pres"], (dino.images(prior) @ dino.images(real).T).mean(), atol=1e-5)
    assert np.isclose(its["dino"], np.mean([one["dino"] for one in its["prompts"].values()]))
    # again: nothing is drawn twice; with other settings nothing is mixed
    lost = next(path for path in images if path.name == "p02_001.png")
    lost.unlink()
    again = run(place, *arguments, script=SCRIPT)
    assert again.stderr.count("0 of 7 images to be drawn") == 3 and "1 of 7" in again.stderr
    assert json.loads((place / "judged/results.json").read_text())["mean"] == found["mean"]
    assert all(path.stat().st_mtime_ns == time for path, time in images.items() if path != lost)
    refused = run(place, *arguments, "--seed=1", script=SCRIPT, status=2).stderr
    assert "was drawn in another way than this command says: give another output_path" in refused
    assert {"my dog.png", "cat.png", "results.json", "table.md"} < {
        p.name for p in (place / "judged").iterdir()
    }
