"""The walls of the house: which wing of ldm may use which, and what no module of a wing may touch."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

LDM = ROOT / "ldm"
MAY_USE = {  # wing -> wings; "" is the ground floor, the modules of ldm itself
    "": set(),
    "networks": {""},
    "weights": {""},
    "sampling": {"networks", "weights", ""},
    "training": {"sampling", "networks", "weights", ""},
    "run": {"weights", ""},
}
MODULES = {".".join(path.relative_to(LDM).with_suffix("").parts): path for path in sorted(LDM.rglob("*.py")) if path.stem != "__init__"}


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
            assert wing(used) == wing(name) or wing(used) in MAY_USE[wing(name)], f"ldm.{name} imports ldm.{used}"


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({name: used_modules(path) for name, path in MODULES.items()}).prepare()  # raises CycleError


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *LDM.rglob("*.py")], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_stay_small_and_without_torch(path):
    assert len(path.read_text().splitlines()) <= 350
    allowed = {"pickle"} if path.name == "torch_pickle.py" else set()  # which runs it with an allow-list
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "diffusers", "transformers", "pickle"} - allowed
