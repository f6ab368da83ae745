"""Checkpoint files: read, load strictly, write atomically. Names are the official checkpoint's (sd_v2_base-57526ee4.ckpt)."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn
from safetensors.numpy import load_file, save_file

logger = logging.getLogger(__name__)


def is_safetensors(path: Path) -> bool:
    """Whether the content (not the name) is safetensors: a header length of 8 bytes, then a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Parameter name to array, from a MindSpore .ckpt or a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; see models/README.md for where to get it")
    try:
        if is_safetensors(path):
            return load_file(path)
        return {name: parameter.asnumpy() for name, parameter in ms.load_checkpoint(str(path)).items()}
    except Exception as error:  # the readers raise whatever the damage leads to
        raise ValueError(f"{path}: not a readable .ckpt or .safetensors file ({str(error).splitlines()[0]}); get it anew") from None


def _examples(names) -> str:
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def load_weights(net: nn.Cell, weights: Mapping[str, np.ndarray], source: str) -> None:
    """Fill every parameter of `net` from `weights`, cast to the parameter's dtype; all or nothing.

    Raises:
        ValueError: names are missing, unknown or of another shape, or a value is not finite; with counts and examples.
    """
    parameters = weights_of(net)
    missing, extra = parameters.keys() - weights.keys(), weights.keys() - parameters.keys()
    shapes = {
        f"{name} {tuple(weights[name].shape)} instead of {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in weights and tuple(weights[name].shape) != tuple(parameter.shape)
    }
    infinite = {name for name in parameters.keys() & weights.keys() if not np.isfinite(weights[name]).all()}
    wrong = {"missing": missing, "not of this model": extra, "of another shape": shapes, "with NaN or Inf": infinite}
    found = "; ".join(f"{what}: {_examples(names)}" for what, names in wrong.items() if names)
    if found:
        raise ValueError(f"{source}: does not fit the model configuration, parameters {found}; is it the right pair of files?")
    for name, parameter in parameters.items():
        values = weights[name].astype(ms.dtype_to_nptype(parameter.dtype), copy=False)
        parameter.set_data(ms.Tensor(values))
    logger.info("%s: %d parameters, %.1fM values", source, len(parameters), sum(p.size for p in parameters.values()) / 1e6)


def save_weights(weights: Mapping[str, np.ndarray | ms.Tensor], path: Path) -> None:
    """Write a checkpoint, .ckpt (MindSpore) or .safetensors by its suffix, under a temporary name that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            save_file({name: np.ascontiguousarray(_array(value)) for name, value in weights.items()}, partial)
        else:
            entries = [
                {"name": name, "data": value if isinstance(value, ms.Tensor) else ms.Tensor(value)} for name, value in weights.items()
            ]
            ms.save_checkpoint(entries, str(partial))
        os.chmod(partial, 0o644)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _array(value) -> np.ndarray:
    return value.asnumpy() if isinstance(value, ms.Tensor) else value


def weights_of(net: nn.Cell) -> dict[str, ms.Tensor]:
    """The parameters of a net by name."""
    return {parameter.name: parameter for parameter in net.get_parameters()}


def spill(net: nn.Cell, folder: Path) -> dict[str, np.memmap]:
    """Move the parameters of `net` out of memory: their values by name, in a file in `folder` that has no name and ends with the process.

    Afterwards `net` is of no use.
    """
    places, start = {}, 0
    with tempfile.TemporaryFile(dir=folder) as file:
        for name, parameter in weights_of(net).items():
            values = np.ascontiguousarray(parameter.asnumpy())
            file.write(values)
            places[name] = slice(start, start + values.nbytes), values.dtype, values.shape
            start += values.nbytes
        file.flush()
        content = np.memmap(file, np.uint8, "r")
    for parameter in net.get_parameters():
        # MindSpore holds on to the parameters of the cell that it compiled last: dropping the cell alone frees nothing.
        parameter.set_data(ms.Tensor([0], parameter.dtype), slice_shape=True)
    return {name: content[place].view(dtype).reshape(shape) for name, (place, dtype, shape) in places.items()}
