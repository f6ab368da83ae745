"""The parameters of a network: filled from a file, strictly; written as one.

Names are the official checkpoint's (sd_v2_base-57526ee4.ckpt).
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn

from ldm.weights.arrays import Arrays, ArraysInMemory, as_numpy, cast, examples, is_finite, is_float
from ldm.weights.layouts import Fitted, fit
from ldm.weights.lora_merge import Added, merged
from ldm.weights.mindspore_ckpt import CKPT_DTYPES
from ldm.weights.recognition import what_it_is
from ldm.weights.source import Source, open_weights

logger = logging.getLogger(__name__)


def load_checkpoint(
    net: nn.Cell, source: str | Path | Source, use_averages: bool = False, added: Sequence[Added] = ()
) -> None:
    """Fill every parameter of `net` from a file or folder, of whatever format.

    Args:
        added: LoRA files that are merged into the weights, see ldm.weights.lora_merge.read_loras.

    Raises as `open_weights` and `load_weights` do.
    """
    if not isinstance(source, Source):
        source = open_weights(Path(source))
    if source.known_by:
        logger.info("%s: %s", source.path, source.known_by)
    load_weights(net, source.arrays, str(source.path), use_averages and source.configs is None, added)


def load_weights(
    net: nn.Cell, weights: Mapping[str, np.ndarray], source: str, use_averages: bool = False,
    added: Sequence[Added] = (),
) -> None:  # fmt: skip
    """Fill every parameter of `net` from a file's `weights`, as `fill` does, whatever their layout, but for
    entries that are known to be of no use to it.

    Args:
        net: the whole model, which has its configuration with it.
        use_averages: take the moving averages that lie in the file beside the weights.
        added: LoRA files that are merged into the weights.

    Raises:
        ValueError: as `fill`; where it is known what the file is instead, the message says that.
    """
    parameters = {parameter.name: parameter for parameter in net.get_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    arrays = weights if isinstance(weights, Arrays) else ArraysInMemory(weights)
    try:
        fitted = fit(arrays, shapes, getattr(net, "config", None), use_averages)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    try:
        fill(parameters, merged(fitted, added), source)
    except ValueError:
        is_whole = _differences(shapes, fitted).keys() <= {"not of this model"}
        if not is_whole and (kind := what_it_is(arrays)):
            raise ValueError(f"{source}: {kind}") from None
        raise
    logger.info(
        "%s: %d parameters, %.1fM values",
        source,
        len(parameters),
        sum(p.size for p in parameters.values()) / 1e6,
    )
    say_what_is_left_out(fitted, source)


def say_what_is_left_out(fitted: Fitted, source: str) -> None:
    if fitted.unused:
        kinds = "; ".join(f"{len(names)} {kind}" for kind, names in fitted.unused.items())
        logger.info("%s: left out, since nothing reads them: %s", source, kinds)


def require_match(shapes: Mapping[str, tuple[int, ...]], fitted: Arrays, whole: Arrays, source: str) -> None:
    """Raise ValueError where parameters are missing, unknown, of another shape or no floats, with counts and
    examples; or with what `whole`, the file, is instead.
    """
    if wrong := _differences(shapes, fitted):
        # a whole model with something more is that, whatever the rest may be
        is_whole = wrong.keys() <= {"not of this model"}
        raise ValueError(f"{source}: {(not is_whole and what_it_is(whole)) or _does_not_match(wrong)}")


def _differences(shapes: Mapping[str, tuple[int, ...]], arrays: Arrays) -> dict[str, list[str]]:
    both = [name for name in shapes if name in arrays]
    found = {
        "missing": shapes.keys() - arrays.keys(),
        "not of this model": arrays.keys() - shapes.keys(),
        "of another shape": [
            f"{name} {arrays.shape(name)} instead of {shapes[name]}"
            for name in both
            if arrays.shape(name) != shapes[name]
        ],
        "not of floats": [
            f"{name} {arrays.dtype(name)}"
            for name in both
            if arrays.shape(name) == shapes[name] and not is_float(arrays.dtype(name))
        ],
    }
    return {what: list(names) for what, names in found.items() if names}


def _does_not_match(wrong: Mapping[str, list[str]]) -> str:
    found = "; ".join(f"{what}: {examples(names)}" for what, names in wrong.items())
    return f"does not match the model configuration: parameters {found}. Check that they belong together."


def fill(parameters: Mapping[str, ms.Parameter], weights: Mapping[str, np.ndarray], source: str) -> None:
    """Fill every one of `parameters` from `weights`, cast to its dtype; all or nothing.

    Asks twice for each array, in turn. Raises as `require_values` does.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    dtypes = {name: CKPT_DTYPES[str(parameter.dtype)] for name, parameter in parameters.items()}
    require_values(shapes, weights, source, dtypes)
    for name, parameter in parameters.items():
        # what is too large became Inf, and was found
        parameter.set_data(ms.Tensor(cast(weights[name], CKPT_DTYPES[str(parameter.dtype)])))


def require_values(
    shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray], source: str,
    dtypes: Mapping[str, np.dtype] | None = None,
) -> None:  # fmt: skip
    """Raises ValueError where names are missing or unknown, or an array is of another shape, no float array
    or not finite (in its dtype of `dtypes`); with counts and examples.
    """
    arrays = arrays if isinstance(arrays, Arrays) else ArraysInMemory(arrays)
    wrong = _differences(dict(shapes), arrays)
    unfit = {text.split(" ")[0] for names in wrong.values() for text in names}
    infinite = [
        name
        for name in shapes
        if name not in unfit and not is_finite(cast(arrays[name], (dtypes or {}).get(name)))
    ]
    if infinite:
        wrong["with NaN or Inf"] = infinite
    if wrong:
        raise ValueError(f"{source}: {_does_not_match(wrong)}")


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
    drop_values(net)
    return {name: content[place].view(dtype).reshape(shape) for name, (place, dtype, shape) in places.items()}


def put_back_values(net: nn.Cell, arrays: Mapping[str, np.ndarray]) -> None:
    """The values of `net` back into memory, after `move_to_disk` or `drop_values`: cells that were compiled
    compute as before.
    """
    for parameter in net.get_parameters():
        values = cast(as_numpy(arrays[parameter.name]), CKPT_DTYPES[str(parameter.dtype)])
        parameter.set_data(ms.Tensor(np.array(values)), slice_shape=True)


def drop_values(net: nn.Cell) -> None:
    """Take the values of `net` out of memory, which is of no use afterwards."""
    for parameter in net.get_parameters():
        # MindSpore holds on to the parameters of the cell that it compiled last: dropping the cell alone
        # frees nothing.
        parameter.set_data(ms.Tensor([0], parameter.dtype), slice_shape=True)


def blank_values(net: nn.Cell) -> None:
    """Take the values of `net` out of memory; what is left can be compiled.

    Memory that NumPy has asked for, and nobody has touched, takes no room.
    """
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor.from_numpy(np.zeros(parameter.shape, parameter.asnumpy().dtype)))
