"""What a command says where it cannot start."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = [
    "train_dreambooth.py", "text_to_image.py", "scripts/convert_checkpoint.py", "scripts/convert_lora.py",
    "scripts/extract_lora.py", "scripts/merge_lora.py", "scripts/weights_of_state.py",
]  # fmt: skip
OLD = """
import runpy, sys
sys.version_info = (3, 9, 18, "final", 0)
sys.argv = ["{0}", "--help"]
sys.path.insert(0, ".")
runpy.run_path("{0}", run_name="__main__")
"""


def said(*words) -> str:
    """The one line that a command ends with; its status must be 2."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_without_packages_or_with_an_old_python(command):
    name = command.split("/")[-1]
    wanted = f"{name}: error: not installed: mindspore, numpy, PIL, omegaconf"
    assert said("-S", "-s", command).startswith(wanted)  # without site-packages
    wanted = f"{name}: error: Python must be 3.10 or newer, got 3.9 ({sys.executable})\n"
    assert said("-c", OLD.format(command)) == wanted
    for file in (command, "ldm/__init__.py", "ldm/installation.py"):  # what an old one has to read before
        ast.parse((ROOT / file).read_text(), feature_version=(3, 9))
