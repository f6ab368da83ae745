"""The commands as a user runs them, on a small random model."""

import json
import shlex

import numpy as np
import pytest
from commands import run, train
from conftest import ROOT, SHALLOW, random_model, read_checkpoint, weights_as_arrays
from PIL import Image

from ldm.images import read_texts
from ldm.networks.latent_diffusion import build_model
from ldm.prompts import PromptSyntax
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.choice import choose_config
from ldm.weights.source import open_weights
from ldm.weights.writing import save_weights


@pytest.fixture(scope="module")
def trained(place, own_cache):
    instance = {path: path.read_bytes() for path in (place / "my dog").iterdir()}
    first = train(place, "--output_path=out")
    assert {path: path.read_bytes() for path in (place / "my dog").iterdir()} == instance
    return first


def losses(place, folder):
    return [json.loads(line)["loss"] for line in (place / folder / "metrics.jsonl").read_text().splitlines()]


def test_training_leaves_what_it_promises(place, trained):
    assert sorted(p.name for p in (place / "classes/dog").iterdir()) == [
        *(f"class_{n:05d}.png" for n in range(3)),
        "drawn_from.json",
    ]
    names = {
        "dreambooth_epoch_1.ckpt",
        "dreambooth_epoch_2.ckpt",
        "effective_config.json",
        "metrics.jsonl",
        "report.html",
        "train.log",
        "checkpoints.sha256",
    }
    # no state: it was not stopped, and done in less than 15 minutes
    assert {p.name for p in (place / "out").iterdir()} == names | {".lock", "run.json"}
    assert sorted(p.name for p in place.iterdir()) == [
        "cache",
        "classes",
        "model.yaml",
        "models",
        "my dog",
        "out",
        "train.yaml",
    ]
    effective = json.loads((place / "out/effective_config.json").read_text())
    used = effective["options"]  # nothing is left open
    assert (used["random_flip"], used["recompute"], used["device"]) == (False, False, "CPU")
    assert effective["options"]["sampling_steps"] == 2 and effective["model"]["unet"]["model_channels"] == 32
    assert len(losses(place, "out")) == 5  # 10 samples in twos
    log = (place / "out/train.log").read_text()
    assert "step 5/5 epoch 2" in log and "images/s" in log and "instance" in log
    base, tuned = (
        read_checkpoint(place / "models/base.ckpt"),
        read_checkpoint(place / "out/dreambooth_epoch_2.ckpt"),
    )
    changed = {name for name in base if not np.array_equal(base[name], tuned[name])}
    assert base.keys() == tuned.keys() and all(not name.startswith("first_stage_model") for name in changed)
    assert any(name.startswith("cond_stage_model") for name in changed) and len(changed) > 0.9 * len(
        [name for name in base if not name.startswith("first_stage_model")]
    )


def test_a_second_run_samples_nothing_and_gives_the_same_losses(place, trained):
    before = {path: path.stat().st_mtime_ns for path in (place / "classes/dog").iterdir()}
    formats = (
        "--save_format=diffusers",
        "--save_dtype=float16",
        "--save_weights_every=2",
        "--keep_weights=1",
    )
    second = train(place, "--output_path=again", *formats)
    assert {path: path.stat().st_mtime_ns for path in (place / "classes/dog").iterdir()} == before
    assert "generating" not in second.stderr
    assert losses(place, "again") == losses(place, "out")
    # in another format: opened without a YAML, the same but for float16
    folders = {path.name for path in (place / "again").glob("dreambooth_*")}
    assert folders == {"dreambooth_epoch_2", "dreambooth_step_4"}
    source, tuned = open_weights(place / "again/dreambooth_epoch_2"), place / "out/dreambooth_epoch_2.ckpt"
    assert choose_config(source).config == SHALLOW
    model = build_model(SHALLOW)
    load_checkpoint(model, source)
    found = weights_as_arrays(model)
    for name, values in read_checkpoint(tuned).items():
        assert np.array_equal(found[name], values.astype(np.float16).astype(np.float32)), name
    assert (
        "latents: 0 cached, 8 to encode" in trained.stderr
        and "latents: 8 cached, 0 to encode" in second.stderr
    )
    assert len(list((place / "cache/dreambooth-mindspore/latents").iterdir())) == 8
    graphs = {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("*.mindir")}
    third = train(place, "--output_path=cached")  # now every graph comes from the compile cache
    assert losses(place, "cached") == losses(place, "out") and "compile cache" in third.stderr
    assert (
        graphs and {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("*.mindir")} == graphs
    )


def test_drawing(place, trained):
    arguments = [
        "--config=model.yaml", "--ckpt_path=out/dreambooth_epoch_2.ckpt", "--prompt=a sks dog on the hill",
        "--sampling_steps=3",
        "--n_iter=2", "--n_samples=2", "--output_path=drawn",
    ]  # fmt: skip
    script = ROOT / "text_to_image.py"
    run(place, *arguments, script=script)
    samples = sorted((place / "drawn/samples").iterdir())
    assert [path.name for path in samples] == [f"{n:05d}.png" for n in range(4)]
    assert Image.open(samples[0]).size == (32, 32) and Image.open(place / "drawn-grid-00000.png").size == (
        70,
        70,
    )
    pixels = [path.read_bytes() for path in samples]
    assert len(set(pixels)) == 4
    (place / "prompts.txt").write_text("a sks dog on the hill\na cat\n")
    more = [
        "--from-file=prompts.txt",
        "--n_iter=1",
        "--fixed_code",
        "--ddim",
        "--ddim_eta=0.5",
        "--n_rows=1",
        "--H=40",
        "--W=32",
    ]
    run(place, *arguments, *more, script=script)
    assert len(list((place / "drawn/samples").iterdir())) == 8  # nothing is overwritten
    assert [path.read_bytes() for path in samples] == pixels
    assert Image.open(place / "drawn-grid-00001.png").size == (36, 4 * 42 + 2)
    assert {path.name for path in (place / "drawn").iterdir()} == {"samples"}


def test_an_image_says_how_it_is_drawn_again(place, trained):
    """Images of a file with options behind prompts, two at a time; and one that began with one of them."""
    (place / "lines.txt").write_text("a (sks:1.2) dog, 'on' the hill\na cat --seed 5 --negative=grey\n")
    common = ["--ckpt_path=out/dreambooth_epoch_2.ckpt", "--steps=3", "--n_iter=1"]
    drawing = ["--data_path=lines.txt", "--n_samples=3", "--batch_size=2", "--output_path=told", "--uni_pc"]
    script, reader = ROOT / "text_to_image.py", ROOT / "scripts/read_recipe.py"
    run(place, *common, *drawing, script=script)
    begun = ["--init_image=told/samples/00004.png", "--n_samples=1", "--output_path=begun", "--strength=.7"]
    run(place, *common, *begun, script=script)
    for number, path in enumerate(
        ["told/samples/00004.png", "told/samples/00002.png", "begun/samples/00000.png"]
    ):
        words = shlex.split(run(place, path, script=reader).stdout)
        assert words[:2] == ["python", str(script)]
        run(place, *words[2:], f"--output_path=again{number}", "--skip_grid", script=script)
        again = place / f"again{number}/samples/00000.png"
        assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(place / path)))
        assert read_texts(again)["dreambooth"] == read_texts(place / path)["dreambooth"]
    text = run(place, "told/samples/00004.png", "--text", script=reader).stdout.splitlines()
    assert text[:2] == ["a cat", "Negative prompt: grey"]
    assert text[2].startswith(
        "Steps: 3, Sampler: UniPC, CFG scale: 9, Seed: 5, Image number: 1, Size: 32x32, "
    )
    run(place, *common, "--no_metadata", "--n_samples=1", "--output_path=silent", script=script)
    assert read_texts(place / "silent/samples/00000.png") == {}
    error = run(place, "silent/samples/00000.png", script=reader, status=2).stderr
    assert "silent/samples/00000.png: holds nothing that text_to_image.py has written" in error
    (place / "told/samples/00004.png").write_bytes((place / "told/samples/00003.png").read_bytes())
    assert "not found: 00004.png (SHA-256" in run(place, "begun/samples/00000.png", script=reader).stderr


class Drawer:
    """Draws nothing: pictures that tell what they were asked for."""

    syntax = PromptSyntax()

    def __init__(self, *_) -> None:
        pass

    def chunk_count(self, prompts) -> int:
        return 1

    def __call__(self, prompts, negative_prompts, seeds, settings, on_step, image) -> np.ndarray:
        pictures = np.zeros((len(prompts), settings.height, settings.width, 3), np.uint8)
        for picture, prompt, (seed, number) in zip(pictures, prompts, seeds):
            picture[:] = ord(prompt[0]), seed, number
        return pictures


@pytest.mark.parametrize("size", [[], ["--batch_size=5"]], ids=["", "batches over prompts"])
@pytest.mark.parametrize("extra, wanted", [
    # 3 prompts, 2 rounds, 2 pictures: files in blocks of a prompt, each picture drawn from the number that it
    # always had
    ([], [("a", 0), ("a", 1), ("a", 6), ("a", 7), ("b", 2), ("b", 3), ("b", 8), ("b", 9), ("c", 4), ("c", 5),
    ("c", 10), ("c", 11)]),
    # one start for all
    (["--fixed_code"], [(prompt, number % 2) for prompt in "abc" for number in range(4)]),
])  # fmt: skip
def test_pictures_come_prompt_by_prompt(place, tmp_path, monkeypatch, size, extra, wanted):
    import text_to_image
    from ldm.sampling import drawer
    from ldm.weights import choice

    monkeypatch.setattr(drawer, "TextToImage", Drawer)
    monkeypatch.setattr(choice, "start_device", lambda *_: "CPU")  # it was started by an earlier test
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    text_to_image.main([
        f"--config={place / 'model.yaml'}", f"--ckpt_path={place / 'models/base.ckpt'}",
        f"--data_path={tmp_path / 'prompts.txt'}",
        "--n_samples=2", "--n_iter=2", "--seed=7", f"--output_path={tmp_path / 'out'}",
        "--compile_cache=False", *extra, *size,
    ])  # fmt: skip
    # as a program does that judges pictures: no grid among them
    files = sorted((tmp_path / "out").rglob("*.png"))
    assert [path.name for path in files] == [f"{n:05d}.png" for n in range(12)]
    assert [tuple(np.asarray(Image.open(path))[0, 0]) for path in files] == [
        (ord(prompt), 7, number) for prompt, number in wanted
    ]
    assert (tmp_path / "out-grid-00000.png").exists()


def test_a_grid_stays_within_a_folder_that_has_no_place_beside_it(tmp_path, monkeypatch):
    import text_to_image

    assert text_to_image.grid_folder(tmp_path / "out") == tmp_path
    monkeypatch.chdir(tmp_path / "..")
    for at_work in (tmp_path.parent, tmp_path.parent.parent):
        assert text_to_image.grid_folder(at_work) == at_work
    monkeypatch.setattr(text_to_image.os.path, "ismount", lambda path: path == tmp_path)  # of a container
    assert text_to_image.grid_folder(tmp_path) == tmp_path


def test_mistakes_end_with_one_line(place, tmp_path, trained):
    weights = weights_as_arrays(random_model(SHALLOW))
    lost = weights.popitem()[0]
    save_weights(weights, place / "models/short.ckpt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/picture.jpg").write_text("hello")
    cases = {
        "--epohcs=1": "did you mean --epochs?",
        "--pretrained_model_file=none.ckpt": "no such file",
        "--pretrained_model_file=short.ckpt": f"missing: 1 ({lost})",
        f"--instance_data_dir={tmp_path / 'empty'}": "no images found",
        f"--instance_data_dir={tmp_path / 'text'}": "picture.jpg: not a readable image",
        "--image_size=33": "image_size must be a multiple of 2, got 33",
        "--device=Ascend": "MindSpore cannot load CANN",
        "--output_path=out": "holds dreambooth_epoch_2.ckpt of an earlier run; give another folder, or",
    }
    for flag, wanted in cases.items():
        errors = [
            line
            for line in train(place, "--output_path=failed", flag, status=2).stderr.splitlines()
            if " INFO " not in line
        ]
        print("\n".join(errors))
        assert (
            len(errors) == 1 and wanted in errors[0] and errors[0].startswith("train_dreambooth.py: error: ")
        )


def test_conversion_command(place, trained):
    script = ROOT / "scripts/convert_checkpoint.py"
    first = run(place, "models/base.ckpt", "folder", "--config=model.yaml", script=script)
    assert "models/base.ckpt: " in first.stdout and "folder: " in first.stdout
    half = ("--to=safetensors", "--dtype=float16")
    run(place, "folder", "back.safetensors", *half, script=script)  # which says itself what it is
    original, back = read_checkpoint(place / "models/base.ckpt"), read_checkpoint(place / "back.safetensors")
    assert original.keys() == back.keys()
    assert all(np.array_equal(value.astype(np.float16), back[name]) for name, value in original.items())
    again = run(place, "folder", "back.safetensors", script=script, status=2).stderr
    assert "back.safetensors: exists already" in again
