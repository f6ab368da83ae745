"""Checkpoint files: read, load strictly, write atomically.

Names are the official checkpoint's (sd_v2_base-57526ee4.ckpt).
"""

import hashlib
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import mindspore as ms
import numpy as np
from mindspore import nn

from ldm.files import appears_whole, sha256_of, write_text
from ldm.weights.layouts import Selected, what_it_is
from ldm.weights.mindspore_ckpt import CKPT_DTYPES, read_ckpt, write_ckpt
from ldm.weights.safetensors_files import is_safetensors, read_safetensors, write_safetensors

DIGESTS = "checkpoints.sha256"
logger = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> Mapping[str, np.ndarray]:
    """Parameter name to array, from a MindSpore .ckpt or a safetensors file; an array is read when it is
    asked for.

    Where a file `checkpoints.sha256` lies beside it and names it, its SHA-256 is compared first. MindSpore's
    published files have the first eight digits of theirs in their name (sd_v2_base-57526ee4.ckpt): a warning
    says where they differ.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither, damaged, or not what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; see models/README.md for where to get it")
    recorded = recorded_digests(path.parent).get(path.name)
    if recorded and sha256_of(path) != recorded:
        raise ValueError(
            f"{path}: not what was written, its SHA-256 differs from the one in {DIGESTS}; it is damaged or "
            f"was replaced"
        )
    published = re.search(r"-(?!\d{8})([0-9a-f]{8})\.ckpt$", path.name)  # eight decimal digits are a date
    if published and not recorded and not (digest := sha256_of(path)).startswith(published[1]):
        logger.warning(
            "%s: its SHA-256 begins with %s, not with %s as its name says: damaged, changed, or another "
            "file; if in doubt, get it again",
            path, digest[:8], published[1],
        )  # fmt: skip
    try:
        return read_safetensors(path) if is_safetensors(path) else read_ckpt(path)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a readable .ckpt or .safetensors file ({reason}); get it again"
        ) from None


def _examples(names) -> str:
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def load_checkpoint(net: nn.Cell, path: str | Path) -> None:
    """Fill every parameter of `net` from a file. Raises as `read_checkpoint` and `load_weights` do."""
    load_weights(net, read_checkpoint(Path(path)), str(path))


def load_weights(net: nn.Cell, weights: Mapping[str, np.ndarray], source: str) -> None:
    """Fill every parameter of `net` from a file's `weights`, as `fill` does, but for entries that are known
    to be of no use to it.

    Raises:
        ValueError: as `fill`; where it is known what the file is instead, the message says that.
    """
    parameters = weights_of(net)
    selected = Selected(weights, parameters)
    try:
        fill(parameters, selected, source)
    except ValueError:
        if kind := what_it_is(weights, parameters):
            raise ValueError(f"{source}: {kind}") from None
        raise
    logger.info(
        "%s: %d parameters, %.1fM values",
        source,
        len(parameters),
        sum(p.size for p in parameters.values()) / 1e6,
    )
    if selected.unused:
        logger.info(
            "%s: left out, since nothing reads them: %s",
            source,
            "; ".join(f"{len(n)} {kind}" for kind, n in selected.unused.items()),
        )


def fill(parameters: Mapping[str, ms.Parameter], weights: Mapping[str, np.ndarray], source: str) -> None:
    """Fill every one of `parameters` from `weights`, cast to its dtype; all or nothing.

    Asks twice for each array, in turn.

    Raises:
        ValueError: names are missing or unknown, or an array is of another shape, no float array or not
            finite; with counts and examples.
    """
    missing, extra = parameters.keys() - weights.keys(), weights.keys() - parameters.keys()
    shapes, kinds, infinite = [], [], []
    for name, parameter in parameters.items():
        if name in missing:
            continue
        values = weights[name]
        if values.shape != tuple(parameter.shape):
            shapes.append(f"{name} {values.shape} instead of {tuple(parameter.shape)}")
        elif values.dtype.kind != "f":
            kinds.append(f"{name} {values.dtype}")
        elif not is_finite(_cast(values, parameter)):
            infinite.append(name)
    wrong = {
        "missing": missing,
        "not of this model": extra,
        "of another shape": shapes,
        "not of floats": kinds,
        "with NaN or Inf": infinite,
    }
    found = "; ".join(f"{what}: {_examples(names)}" for what, names in wrong.items() if names)
    if found:
        raise ValueError(
            f"{source}: does not match the model configuration: parameters {found}. Check that they belong "
            f"together."
        )
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(_cast(weights[name], parameter)))


def _cast(values: np.ndarray, parameter: ms.Parameter) -> np.ndarray:
    with np.errstate(over="ignore"):  # to Inf, which is then found
        return values.astype(CKPT_DTYPES[str(parameter.dtype)], copy=False)


def is_finite(values: np.ndarray) -> bool:
    """Without an array of booleans: no sum in float64 of finite float32 values overflows, and NaN and Inf
    stay.
    """
    with np.errstate(invalid="ignore"):  # Inf - Inf
        return bool(np.isfinite(values.sum(dtype=np.float64)))


def save_weights(weights: Mapping[str, np.ndarray | ms.Tensor], path: Path, record: bool = False) -> str:
    """Write a checkpoint, .ckpt (MindSpore) or .safetensors by its suffix; it appears whole or not at all.

    Args:
        record: note its SHA-256 in `checkpoints.sha256` beside it, before it gets its name.

    Returns:
        The SHA-256 of the file.

    Raises:
        ValueError: a value is no array, or of a dtype that cannot be stored.
    """
    with appears_whole(path) as file:
        if path.suffix == ".safetensors":
            write_safetensors({name: _array(value) for name, value in weights.items()}, Path(file.name))
            digest = sha256_of(Path(file.name))
        else:
            hashing = _Hashing(file)
            write_ckpt(hashing, ((name, _array(value)) for name, value in weights.items()))
            digest = hashing.digest.hexdigest()
        if record:
            record_digest(path, digest)
    return digest


def recorded_digests(folder: Path) -> dict[str, str]:
    """File name to SHA-256, from the folder's `checkpoints.sha256`, which `sha256sum --check` reads too."""
    path = folder / DIGESTS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def record_digest(path: Path, digest: str) -> None:
    """Note a file's SHA-256 in its folder's `checkpoints.sha256`."""
    write_digests(path.parent, recorded_digests(path.parent) | {path.name: digest})


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    write_text(folder / DIGESTS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


class _Hashing:
    """A file that is written to, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content) -> None:
        self.file.write(content)
        self.digest.update(content)


def _array(value: np.ndarray | ms.Tensor) -> np.ndarray:
    """On a CPU a tensor's own memory, no copy."""
    return value.asnumpy() if isinstance(value, ms.Tensor) else np.asarray(value)


def weights_of(net: nn.Cell) -> dict[str, ms.Tensor]:
    """The parameters of a net by name."""
    return {parameter.name: parameter for parameter in net.get_parameters()}


def move_to_disk(net: nn.Cell, folder: Path) -> dict[str, np.memmap]:
    """The parameters of `net` by name, moved out of memory into a file in `folder` that has no name and ends
    with the process.

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
        # MindSpore holds on to the parameters of the cell that it compiled last: dropping the cell alone
        # frees nothing.
        parameter.set_data(ms.Tensor([0], parameter.dtype), slice_shape=True)
    return {name: content[place].view(dtype).reshape(shape) for name, (place, dtype, shape) in places.items()}
