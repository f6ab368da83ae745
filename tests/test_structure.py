"""A module of ldm imports only from lower rows; what ships does not import torch."""

import ast

from conftest import ROOT

ROWS = [
    {"mindone_config"},
    {"config", "runtime", "ranks", "tokenizer", "weight_files", "torch_files", "layouts"},
    {"options", "images", "schedule", "models.kernels"},
    {"models.convolution"},
    {"models.layers"},
    {"models.attention", "models.autoencoder", "models.text_encoder", "samplers"},
    {"models.unet"},
    {"models.latent_diffusion", "data", "optim", "convert", "checkpoint"},
    {"loss", "latent_cache", "run_state"},
    {"pipeline", "train_step", "recipe"},
    {"trainer"},
]


def imports(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} if node.module != "ldm" else {f"ldm.{alias.name}" for alias in node.names}
    return names


def test_imports_point_downwards():
    row_of = {name: number for number, row in enumerate(ROWS) for name in row}
    modules = {".".join(p.relative_to(ROOT / "ldm").with_suffix("").parts): p for p in (ROOT / "ldm").rglob("*.py") if p.stem != "__init__"}
    assert modules.keys() == row_of.keys()
    for name, path in modules.items():
        for used in imports(path):
            if used.startswith("ldm."):
                assert row_of[used.removeprefix("ldm.")] < row_of[name], f"ldm.{name} imports {used}"


def test_files_stay_small_and_without_torch():
    for path in [*ROOT.glob("*.py"), *(ROOT / "ldm").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 350, path
        allowed = {"pickle"} if path.name == "torch_files.py" else set()  # which runs it with an allow-list
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "transformers", "pickle"} - allowed, path
