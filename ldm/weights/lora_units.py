"""What a low-rank addition can be of, and how the programs of the field name that.

Names and shapes only. The sources: diffusers' module names (huggingface/diffusers), which PEFT's files have;
kohya-ss/sd-scripts, networks/lora.py, whose names are diffusers' with underscores; mindone's, which are the
official ones.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ldm.config import ModelConfig
from ldm.fields import LORA_TARGETS
from ldm.weights.diffusers_names import TEXT, UNET, diffusers_names
from ldm.weights.stability_names import stability_names

DOWN, UP = ".lora_down.weight", ".lora_up.weight"  # of an addition, behind the name of its layer
PATTERNS = dict(zip(LORA_TARGETS, (
    r"\.attn[12]\.to_(q|k|v|out\.0)|\.self_attn\.(q|k|v|out)_proj",
    r"\.ff\.net\.(0\.proj|2)|\.mlp\.fc[12]",
    r"\.attentions\.\d+\.proj_(in|out)",
    r"\.resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|samplers\.0\.conv",
)))  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A matrix, or the kernel of a convolution, that can have an addition.

    Attributes:
        name: official name of its layer; of a third of a joined projection with .q, .k or .v behind it.
        weight: the official parameter.
        shape: (out, in) or (out, in, k, k).
        diffusers: its name there, after `unet.` or `text_encoder.`.
        target: one of LORA_TARGETS, or None: of a layer that nobody trains so.
        part: which third of `weight` it is, or None.
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    diffusers: str
    target: str | None
    part: int | None = None

    @property
    def is_of_text(self) -> bool:
        return self.diffusers.startswith("text_encoder.")

    @property
    def kohya(self) -> str:
        folder, _, module = self.diffusers.partition(".")
        return f"lora_{'te' if self.is_of_text else folder}_{module.replace('.', '_')}"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B in a file: (rank, in[, k, k]) and (out, rank[, 1, 1])."""
        out, *inner = self.shape
        return (rank, *inner), (out, rank, *(1 for _ in inner[1:]))


def units_of(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Unit]:
    """By name, in the order of the model.

    Args:
        shapes: of the model's parameters, by official names.
    """
    found = {}
    for weight, shape in shapes.items():
        is_matrix = weight.endswith(".weight") and len(shape) in (2, 4) and weight.startswith((UNET, TEXT))
        if not is_matrix:
            continue
        folder, names = diffusers_names(weight, config)
        for part, name in enumerate(names):
            diffusers = f"{folder}.{name.removesuffix('.weight')}"
            own = weight.removesuffix(".weight")
            own_shape = (shape[0] // len(names), *shape[1:])
            target = next((key for key, pattern in PATTERNS.items() if re.search(f"({pattern})$", diffusers)),
                          None)  # fmt: skip
            third = part if len(names) == 3 else None
            unit = own if third is None else f"{own}.{'qkv'[part]}"
            found[unit] = Unit(unit, weight, own_shape, diffusers, target, third)
    return found


def spellings(units: Mapping[str, Unit]) -> dict[str, list[Unit]]:
    """Name of a module in a file to what it is of; one of a joined projection is of three."""
    found: dict[str, list[Unit]] = {}
    for unit in units.values():
        for name in dict.fromkeys(_spellings(unit)):
            found.setdefault(name, []).append(unit)
    return found


def _spellings(unit: Unit) -> Iterator[str]:
    folder, _, module = unit.diffusers.partition(".")
    short, flat = ("te", module.removeprefix("text_model.")) if unit.is_of_text else ("unet", module)
    # transformers from 5.6 on has no text_model in its names
    for name in dict.fromkeys((module, flat)):
        yield from (f"{folder}.{name}", name, f"lora_{short}_{name.replace('.', '_')}")
    yield from (unit.name, unit.weight.removesuffix(".weight"))
    if unit.part is None:
        (stability,) = stability_names(unit.weight, is_open_clip=True)
        stability = stability.removesuffix(".weight").removeprefix(UNET).removeprefix("cond_stage_model.")
        yield f"lora_{short}_{stability.replace('.', '_')}"
        if not unit.is_of_text:
            yield f"diffusion_model.{stability}"  # ComfyUI's
