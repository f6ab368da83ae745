"""Options as parsed from flags and a file: of the fixture `files`."""

import pytest

from ldm.command_line import parse_options
from ldm.options import TrainOptions


def train(files, *extra, config="train.yaml"):
    return parse_options(TrainOptions, [
        f"--train_config={files / config}", f"--instance_data_dir={files / 'instance'}",
        "--instance_prompt=a sks dog",
        f"--class_data_dir={files / 'class'}", "--class_prompt=a dog", f"--pretrained_model_path={files}",
        "--pretrained_model_file=base.ckpt", *extra,
    ])  # fmt: skip


def error_of(capsys, call) -> str:
    """The one line that a refused command line prints; its exit status must be 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    output = capsys.readouterr()
    assert stop.value.code == 2 and not output.out and output.err.count("\n") == 1
    return output.err
