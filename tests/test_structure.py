"""The walls of the house: which wing of ldm may use which, and what no module of a wing may touch."""

import ast
import dataclasses
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT
from evaluate import EvaluateOptions

from ldm.command_line import make_parser
from ldm.options import TrainOptions
from ldm.sample_options import SampleOptions

LDM = ROOT / "ldm"
MAY_USE = {  # wing -> wings; "" is the ground floor, the modules of ldm itself
    "": set(),
    "networks": {""},
    "weights": {""},
    "sampling": {"networks", "weights", ""},
    "training": {"sampling", "networks", "weights", ""},
    "run": {"weights", ""},
    "evaluation": {"weights", ""},
}
MODULES = {
    ".".join(path.relative_to(LDM).with_suffix("").parts): path
    for path in sorted(LDM.rglob("*.py"))
    if path.stem != "__init__"
}


def wing(name: str) -> str:
    return name.rpartition(".")[0]


def imported(path: Path) -> set[str]:
    """Dotted names of what a file imports, also within functions and for type checkers only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def used_modules(path: Path) -> set[str]:
    """The modules of ldm that a file imports."""
    return {name.removeprefix("ldm.") for name in imported(path)} & MODULES.keys()


def test_a_wing_uses_only_wings_below_it():
    assert {wing(name) for name in MODULES} == MAY_USE.keys()
    for name, path in MODULES.items():
        for used in used_modules(path):
            assert wing(used) == wing(name) or wing(used) in MAY_USE[wing(name)], (
                f"ldm.{name} imports ldm.{used}"
            )


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(
        {name: used_modules(path) for name, path in MODULES.items()}
    ).prepare()  # raises CycleError


WRITERS = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "rename", "replace", "touch", "rmtree"}


@pytest.mark.parametrize("name", [name for name in MODULES if wing(name) == "training"])
def test_a_training_step_knows_no_files_and_no_signals(name):
    assert not imported(MODULES[name]) & {"os", "signal", "shutil", "logging.handlers"}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open"
        if isinstance(node, ast.Attribute) and node.attr in WRITERS:
            # dataclasses.replace and str.replace are no writers
            assert node.attr == "replace" and getattr(node.value, "id", "") != "os", (name, node.lineno)


def test_files_stay_small_and_without_torch():
    for path in [*ROOT.glob("*.py"), *LDM.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= (150 if path.parent == ROOT else 350), path
        allowed = {"pickle"} if path.name == "torch_pickle.py" else set()  # which runs it with an allow-list
        packages = {name.split(".")[0] for name in imported(path)}
        assert not packages & {"torch", "diffusers", "transformers", "pickle"} - allowed, path


def test_the_readme_names_what_is_there():
    """Every flag is one of the commands'; what the snippet imports exists."""
    text = (ROOT / "README.md").read_text()
    flags = {flag for cls in (TrainOptions, SampleOptions) for flag in flags_of(cls)}
    flags |= flags_of(EvaluateOptions)
    for script in ("convert_checkpoint", "extract_lora", "read_recipe"):
        flags |= set(re.findall(r'"(--\w+)"', (ROOT / f"scripts/{script}.py").read_text()))
    for flag in set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]+", text)) - {"--help"}:
        assert flag in flags, flag
    for spec in dataclasses.fields(TrainOptions):
        if spec.metadata["group"] in ("captions", "recipes", "validation"):  # all of them are in it
            assert f"`--{spec.name}" in text, spec.name
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.ImportFrom):
            module = ast.parse(MODULES[node.module.removeprefix("ldm.")].read_text())
            defined = {part.name for part in module.body if isinstance(part, (ast.FunctionDef, ast.ClassDef))}
            assert {alias.name for alias in node.names} <= defined, node.module


def flags_of(cls) -> set[str]:
    return {flag for action in make_parser(cls)._actions for flag in action.option_strings}
