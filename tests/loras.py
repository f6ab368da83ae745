"""Random LoRA files, in the spellings of the programs that write them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ldm.networks.latent_diffusion import build_model
from ldm.weights.lora_files import Pair
from ldm.weights.lora_units import Unit, units_of
from ldm.weights.lora_writing import write_lora


def units_in(config) -> dict[str, Unit]:
    return units_of(build_model(config).parameter_shapes(), config)


def random_pairs(units, rank=3, alpha=2.0, targets=("attention",), strength=0.3, seed=0) -> dict[str, Pair]:
    """Of every unit of these targets; what they add is about `strength` of a weight that keeps variances."""
    rng, pairs = np.random.default_rng(seed), {}
    for name, unit in units.items():
        if unit.target in targets:
            size = int(np.prod(unit.shape[1:]))
            down = rng.standard_normal((rank, size)).astype(np.float32)
            up = rng.standard_normal((unit.shape[0], rank)) * strength / np.sqrt(size * rank) * rank / alpha
            pairs[name] = Pair(down, up.astype(np.float32), alpha)
    return pairs


def written(path: Path, units, pairs, naming="kohya", dtype=np.float32, metadata=None) -> Path:
    """By this program."""
    write_lora(pairs, units, path, naming, np.dtype(dtype), metadata or {})
    return path


def spelled(path: Path, units, pairs, spelling, four=False) -> Path:
    """In names of others.

    Args:
        spelling: what a unit is called; what follows that: in A, in B, and maybe in alpha; maybe metadata.
        four: linear layers as 1x1 convolutions.
    """
    name, down, up, alpha, metadata = (*spelling, None, None)[:5]
    arrays = {}
    for key, pair in pairs.items():
        for ending, array, shape in zip((down, up), (pair.down, pair.up), units[key].shapes(pair.rank)):
            array = array.reshape(shape)
            arrays[name(units[key]) + ending] = array[..., None, None] if four and array.ndim == 2 else array
        if alpha:
            arrays[name(units[key]) + alpha] = np.array(pair.alpha, np.float32)
    save_file(arrays, path, metadata)
    return path


def without_text_model(name: str) -> str:
    return name.replace("text_model.", "").replace("text_model_", "")


def processor_name(unit: Unit) -> str:
    """diffusers' attention processors of 2023."""
    name = unit.diffusers.replace(".to_out.0", ".to_out")
    for part in ("q", "k", "v", "out"):
        name = name.replace(f".self_attn.{part}_proj", f".self_attn.to_{part}")
    head, _, last = name.rpartition(".")
    return f"{head}.{last}" if unit.is_of_text else f"{head}.processor.{last}"


def adapter_metadata(rank, alpha) -> dict[str, str]:
    values = {f"{folder}.{key}": value for folder in ("unet", "text_encoder")
              for key, value in (("r", rank), ("lora_alpha", alpha), ("use_dora", False))}  # fmt: skip
    return {"format": "pt", "lora_adapter_metadata": json.dumps(values)}
