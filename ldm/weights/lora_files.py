"""Files of LoRA: what they hold, whoever wrote them.

Read are kohya's names, in diffusers' and in Stability's scheme, PEFT's and diffusers' in all spellings since
0.12, mindone's checkpoints and this program's own; linear layers and convolutions; float32, float16 and
bfloat16. An entry that is not understood refuses the file.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.weights.arrays import Arrays, examples, is_finite, is_float
from ldm.weights.lora_units import Unit, spellings
from ldm.weights.source import compare_digest, read_file, read_json

ENDINGS = {
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora_A.default.weight": "down",
    ".lora.down.weight": "down", "_lora.down.weight": "down", ".lora_linear_layer.down.weight": "down",
    ".lora_up.weight": "up", ".lora_B.weight": "up", ".lora_B.default.weight": "up",
    ".lora.up.weight": "up", "_lora.up.weight": "up", ".lora_linear_layer.up.weight": "up",
    "_lora.alpha": "alpha", ".lora.alpha": "alpha", ".lora_linear_layer.alpha": "alpha", ".alpha": "alpha",
}  # fmt: skip
OTHER_KINDS = {  # patterns of entries
    r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.b?oft_": "OFT",
    r"\.dora_scale|\.lora_magnitude_vector": "DoRA",
    r"\.lora_mid\.": "LoCon with a decomposed kernel", r"\.diff(_b)?$": "full differences",
    r"\.ia3\.": "IA3", r"^unet:\d+:": "cloneofsimo's LoRA, without names",
    r"^lora_te[12]_|^text_encoder_2\.": "LoRA for Stable Diffusion XL",
    r"^lora_transformer_|^transformer\.|^lora_unet_(double|single|joint)_blocks":
        "LoRA for Flux or Stable Diffusion 3",
}  # fmt: skip
PEFT = "base_model.model."
FOLDER_FILES = (
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """An addition: `alpha` / rank times up times down, down (rank, in * k * k), up (out, rank), float32."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> np.ndarray:
        """(out, in * k * k) float32."""
        return (self.up @ self.down) * np.float32(self.alpha / self.rank)


@dataclass(frozen=True)
class Lora:
    """What a file holds: its additions by the names of ldm.weights.lora_units, its texts, and what the
    additions are of.
    """

    path: Path
    pairs: dict[str, Pair]
    metadata: dict[str, str] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)

    def ranks(self) -> str:
        return ", ".join(map(str, sorted({pair.rank for pair in self.pairs.values()})))


def read_lora(path: Path, units: Mapping[str, Unit]) -> Lora:
    """A file, or a folder of PEFT or diffusers with one.

    Args:
        units: what the model has, of ldm.weights.lora_units.units_of.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no LoRA, one of another kind or model, damaged or incomplete.
    """
    file, stated = find_lora(path)
    compare_digest(file)
    arrays = read_file(file)
    metadata = dict(getattr(arrays, "metadata", {}))
    try:
        found = _sort(arrays, spellings(units))
        scales = _Scales(stated, metadata)
        pairs = {name: _pair(arrays, units[name], entries, scales) for name, entries in found.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if "lora_rank" in arrays and {pair.rank for pair in pairs.values()} != {_number(arrays, "lora_rank")}:
        raise ValueError(f"{file}: its lora_rank is not the rank of its arrays: damaged, or changed by hand")
    return Lora(file, pairs, metadata, {name: units[name] for name in pairs})


def find_lora(path: Path) -> tuple[Path, dict]:
    """The file, and what PEFT's adapter_config.json beside it says."""
    if not path.exists():
        raise FileNotFoundError(f"LoRA {path}: no such file")
    if path.is_dir():
        there = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"LoRA {path}: a folder without {', '.join(FOLDER_FILES)}; give the file")
        path = there[0]
    config = path.with_name("adapter_config.json")
    is_peft = path.name.startswith("adapter_model.") and config.is_file()
    return path, read_json(config) if is_peft else {}


def is_lora(names: Mapping | list[str]) -> bool:
    """Whether any of a file's names is one of a LoRA."""
    return any(
        name.startswith(("lora_unet_", "lora_te_")) or name.endswith(tuple(ENDINGS)[:-1]) for name in names
    )


def _sort(arrays: Arrays, known: Mapping[str, list[Unit]]) -> dict[str, dict[str, str]]:
    """Name of each addition to its entries: down, up, and maybe alpha."""
    found, unknown = {}, []
    for entry in arrays:
        if entry == "lora_rank":  # mindone's
            continue
        module, kind = _parse(entry)
        if not kind or module not in known:
            unknown.append(entry)
            continue
        for unit in known[module]:
            entries = found.setdefault(unit.name, {})
            if kind in entries:
                raise ValueError(f"{entry} and {entries[kind]} are the same addition")
            entries[kind] = entry
    if unknown:
        kinds = {kind for pattern, kind in OTHER_KINDS.items() if any(re.search(pattern, e) for e in unknown)}
        if kinds:
            raise ValueError(f"this is {' and '.join(sorted(kinds))}, which is not read: give a plain LoRA")
        if not is_lora(arrays):
            raise ValueError("not a LoRA: a whole model goes with --ckpt_path or --pretrained_model_path")
        if not found:
            raise ValueError("not a LoRA for this model: none of its entries is an addition to it")
        raise ValueError(f"entries that are not understood or not of this model: {examples(unknown)}")
    halves = [entries[kind] for entries in found.values() for kind in entries
              if not {"down", "up"} <= entries.keys()]  # fmt: skip
    if halves:
        raise ValueError(f"additions without their other half: {examples(set(halves))}")
    if not found:
        raise ValueError("not a LoRA: it is empty")
    return found


def _parse(entry: str) -> tuple[str, str | None]:
    """The module that an entry is of, in the common spelling, and what it is: down, up or alpha."""
    ending = next((ending for ending in ENDINGS if entry.endswith(ending)), None)
    if ending is None:
        return entry, None
    module = entry.removesuffix(ending).removeprefix(PEFT)
    if ".processor." in module or ending.startswith("_lora"):  # diffusers' first attention processors
        module = module.replace(".processor.", ".")
        if ".self_attn." in module:
            module = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)
        module = re.sub(r"\.to_out$", ".to_out.0", module)
    return module, ENDINGS[ending]


class _Scales:
    """What lies beside the arrays says of their scale: PEFT's adapter_config.json, diffusers' metadata.

    Raises ValueError where it says that the additions are no plain ones.
    """

    def __init__(self, stated: dict, metadata: Mapping[str, str]) -> None:
        self.by_folder: dict[str, dict] = {"": stated} if stated else {}
        if "lora_adapter_metadata" in metadata:
            try:
                packed = dict(json.loads(metadata["lora_adapter_metadata"]))
            except (ValueError, TypeError, RecursionError):
                raise ValueError("its lora_adapter_metadata is not readable as JSON") from None
            for key, value in packed.items():
                folder, _, name = key.partition(".")
                self.by_folder.setdefault(folder, {})[name] = value
        for config in self.by_folder.values():
            if config.get("use_dora"):
                raise ValueError("this is DoRA, which is not read: give a plain LoRA")

    def alpha(self, unit: Unit, rank: int) -> float:
        folder, _, module = unit.diffusers.partition(".")
        config = self.by_folder.get(folder, self.by_folder.get("", {}))
        alpha = config.get("lora_alpha", rank)
        patterns = config.get("alpha_pattern") or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = value
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"lora_alpha must be a number, got {alpha!r}")
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _pair(arrays: Arrays, unit: Unit, entries: Mapping[str, str], scales: _Scales) -> Pair:
    """An addition, read. Raises ValueError where its shapes do not fit the model, or a value is no number."""
    down_name, up_name = entries["down"], entries["up"]
    down_shape, up_shape = arrays.shape(down_name), arrays.shape(up_name)
    for name in (down_name, up_name):
        if not is_float(arrays.dtype(name)):
            raise ValueError(f"{name} must hold floats, got {arrays.dtype(name)}")
    is_joined = unit.part is not None and _parse(up_name)[0] == unit.weight.removesuffix(".weight")
    thirds = 3 if is_joined else 1
    rank = down_shape[0] if down_shape else 0
    wanted_down, (out, *_) = unit.shapes(rank)[0], unit.shape
    fits = (
        rank > 0
        and _squeezed(down_shape) == _squeezed(wanted_down)
        and _squeezed(up_shape) == (thirds * out, rank)
    )
    if not fits:
        raise ValueError(
            f"{down_name} {down_shape} and {up_name} {up_shape} do not fit the model's {unit.weight} "
            f"{unit.shape}: is it for another version of Stable Diffusion?"
        )
    down = np.asarray(arrays[down_name], np.float32).reshape(rank, -1)
    up = np.asarray(arrays[up_name], np.float32).reshape(thirds * out, rank)
    if thirds > 1:
        up = np.split(up, 3)[unit.part]
    alpha = _number(arrays, entries["alpha"]) if "alpha" in entries else scales.alpha(unit, rank)
    for name, values in ((down_name, down), (up_name, up), (entries.get("alpha"), np.float64(alpha))):
        if not is_finite(values):
            raise ValueError(f"{name} has NaN or Inf")
    return Pair(down, np.ascontiguousarray(up), float(alpha) or float(rank))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer's shape for that of a 1x1 convolution."""
    return shape[:2] if set(shape[2:]) <= {1} and len(shape) in (2, 4) else shape


def _number(arrays: Arrays, name: str) -> float:
    values = np.asarray(arrays[name], np.float64)
    if values.size != 1:
        raise ValueError(f"{name} must be one number, got an array of {values.shape}")
    return float(values.reshape(()))
