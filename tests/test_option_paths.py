"""Paths and folders as people give them."""

import json
import shlex
from pathlib import Path

from conftest import ROOT, write_pictures
from given_options import error_of, train

from ldm.command_line import parse_options
from ldm.options import TrainOptions
from ldm.sample_options import SampleOptions


def test_class_folder_inside_instance_folder_is_refused(files, capsys):
    for folder in (files / "instance", files / "instance/class"):
        assert "give a folder of its own" in error_of(
            capsys, lambda f=folder: train(files, f"--class_data_dir={f}")
        )


def test_paths_begin_at_the_home_folder(files, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    (files / "train.json").write_text(json.dumps({"output_path": "~/out"}))
    assert train(files, config="train.json").output_path == f"{files}/out"
    options = train(
        files, "--pretrained_model_path=~", "--instance_data_dir=~/instance", "--train_config=~/train.yaml"
    )
    assert options.checkpoint == files / "base.ckpt" and options.train_config == f"{files}/train.yaml"
    for name in ("a.safetensors", "prompts.txt"):
        (files / name).write_text("x")
    drawn = parse_options(SampleOptions, [
        "--ckpt_path=~/base.ckpt", "--lora_ckpt_path", "~/a.safetensors:0.5", "--data_path=~/prompts.txt",
    ])  # fmt: skip
    assert drawn.checkpoint == files / "base.ckpt" and drawn.loras == (f"{files}/a.safetensors:0.5",)
    assert drawn.data_path == f"{files}/prompts.txt"
    wanted = "output_path ~nobody-here/out: no home folder is known for it"
    assert wanted in error_of(capsys, lambda: train(files, "--output_path=~nobody-here/out"))


def test_paths_with_what_a_terminal_adds(files, capsys):
    """Quotation marks of "copy as path", the \r of a script from Windows; an empty variable is no path."""
    for path in (f'"{files / "instance"}"', f"{files / 'instance'}\r", " out"):
        error = error_of(capsys, lambda path=path: train(files, f"--output_path={path}"))
        assert f"must be a path, got {path!r}: with spaces or quotation marks around it" in error
    assert train(files, "--output_path=", "--pretrained_model_file=base.ckpt").output_path == "output"
    assert "--instance_data_dir is missing" in error_of(capsys, lambda: train(files, "--instance_data_dir="))
    assert "must be a folder, got a file" in error_of(
        capsys, lambda: train(files, f"--instance_data_dir={files / 'base.ckpt'}")
    )


def test_results_and_pictures_lie_apart(files, capsys):
    (files / "link").symlink_to(files / "instance")
    for output in (files / "instance", files / "instance/out", files / "link/out", files, files / "x/.."):
        error = error_of(capsys, lambda output=output: train(files, f"--output_path={output}"))
        assert "must lie apart from instance_data_dir" in error
    for output in (files / "class", files / "class/out"):
        error = error_of(capsys, lambda output=output: train(files, f"--output_path={output}"))
        assert "lies in class_data_dir" in error
    train(files, f"--output_path={files / 'out'}", f"--class_data_dir={files / 'out/class'}")


def test_a_missing_checkpoint_says_what_there_is_to_try(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, lambda: parse_options(SampleOptions, []))
    program, *words = shlex.split(error.split("try the embedded model: python ")[1])
    assert Path(program).is_file() and parse_options(SampleOptions, words).checkpoint.is_file()
    assert "embedded" not in error_of(capsys, lambda: parse_options(SampleOptions, ["--ckpt_path=no.ckpt"]))
    write_pictures(tmp_path / "dog", 1)
    monkeypatch.chdir(tmp_path)
    words = ["--instance_data_dir=dog", "--instance_prompt=x", "--class_data_dir=c", "--class_prompt=y"]
    assert f"try the embedded model: bash {ROOT}/scripts/demo.sh" in error_of(
        capsys, lambda: parse_options(TrainOptions, words)
    )
