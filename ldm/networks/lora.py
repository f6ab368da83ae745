"""Low-rank additions to the layers of networks that are not trained themselves: W + alpha / rank * B A (Hu et
al. 2021, arXiv 2106.09685, section 4.1).

A, the way down, is called `lora_down`, and B, the way up, `lora_up`, after the name of their layer. They are
layers of the same kind as theirs; the weights stay apart, so that no copy of them is made.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import mindspore as ms
from mindspore import Parameter, nn, ops

from ldm.networks import layers as plain
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.networks.layer_set import LayerSet

THIRDS = ("q", "k", "v")  # of a joined projection, each with an addition of its own


class LowRank(nn.Cell):
    """What is added to the answer of a layer: `scale` times up(down(x)).

    Args:
        dropout: of the input, as PEFT has it.
    """

    def __init__(self, down: nn.Cell, up: nn.Cell, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_down, self.lora_up, self.scale = down, up, scale
        self.is_scaled, self.drops = scale != 1, dropout > 0
        self.dropout = nn.Dropout(p=dropout)

    def construct(self, x, *size):
        return self.lora_up(self.scaled(self.lora_down(self.kept(x))), *size)

    def apply(self, x, down, up):
        """The addition with weights that are given; of dense layers."""
        return self.lora_up.apply(self.scaled(self.lora_down.apply(self.kept(x), down)), up)

    def kept(self, x):
        return self.dropout(x) if self.drops else x

    def scaled(self, h):
        return h * self.scale if self.is_scaled else h

    def weights(self):
        return self.lora_down.weight, self.lora_up.weight


class Thirds(nn.Cell):
    """Additions to query, key and value, side by side as their joined projection has them."""

    def __init__(self, q: LowRank, k: LowRank, v: LowRank) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v

    def construct(self, x):
        return ops.cat((self.q(x), self.k(x), self.v(x)), -1)


class WithLora(nn.Cell):
    """A layer and what is added to its answer."""

    def __init__(self, layer: nn.Cell, addition: nn.Cell) -> None:
        super().__init__()
        self.layer, self.addition = layer, addition

    def construct(self, x, *size):
        return self.layer(x, *size) + self.addition(x, *size)

    def weights(self):
        return self.layer.weights() + self.addition.weights()

    def apply(self, x, *weights):
        """Both with weights that are given, those of `weights`."""
        return self.layer.apply(x, *weights[:-2]) + self.addition.apply(x, *weights[-2:])


class Size(NamedTuple):
    """Of an addition; `alpha` / `rank` multiplies it."""

    rank: int
    alpha: float


def low_rank(layer: nn.Cell, size: Size, dropout: float, layers: LayerSet, parts: int = 1) -> LowRank:
    """The addition to a layer, or to each of its `parts`."""
    rank, inside = size.rank, dict(has_bias=False)
    into, out = layer.in_channels, layer.out_channels // parts
    if isinstance(layer, plain.Conv2d):
        down = layers.Conv2d(into, rank, layer.kernel, layer.stride, layer.padding, **inside)
        up = layers.Conv2d(rank, out, 1, **inside)
    elif isinstance(layer, plain.TokensToPlaces):
        down, up = layers.Dense(into, rank, **inside), layers.TokensToPlaces(rank, out, **inside)
    elif isinstance(layer, plain.PlacesToTokens):
        down, up = layers.PlacesToTokens(into, rank, **inside), layers.Dense(rank, out, **inside)
    else:
        down, up = layers.Dense(into, rank, **inside), layers.Dense(rank, out, **inside)
    up.weight = Parameter(ms.ops.zeros(up.weight.shape, ms.float32), name="weight")
    return LowRank(down, up, size.alpha / rank, dropout)


def module_of(unit: str) -> str:
    """The layer that an addition is of: `...in_proj.q` is one of three to `...in_proj`."""
    module, _, last = unit.rpartition(".")
    return module if last in THIRDS and module.endswith(".in_proj") else unit


def add_lora(
    model: LatentDiffusion, sizes: Mapping[str, Size], dropout: float, layers: LayerSet
) -> dict[str, Parameter]:
    """Put additions to layers of a model; where B is zero, as it is here, the model answers as before.

    Args:
        sizes: by the official name of the layer; to a joined projection with .q, .k and .v behind it.

    Returns:
        The parameters of the additions by name.
    """
    names = {id(parameter): parameter.name for parameter in model.get_parameters()}
    found = {}
    for module in dict.fromkeys(map(module_of, sizes)):
        *path, last = module.split(".")
        parent = _cell(model, path)
        layer = _cell(parent, [last])
        if module in sizes:
            units = {module: low_rank(layer, sizes[module], dropout, layers)}
            addition = units[module]
        else:
            names_of_thirds = [f"{module}.{third}" for third in THIRDS]
            units = {name: low_rank(layer, sizes[name], dropout, layers, 3) for name in names_of_thirds}
            addition = Thirds(*units.values())
        if last.isdecimal():
            parent[int(last)] = WithLora(layer, addition)
        else:
            setattr(parent, last, WithLora(layer, addition))
        for name, unit in units.items():
            found |= {f"{name}.{own}": parameter for own, parameter in unit.parameters_and_names()}
    for name, parameter in found.items():
        names[id(parameter)] = name
    for parameter in model.get_parameters():  # which the cells have renamed as they took each other in
        parameter.name = names[id(parameter)]
    return found


def _cell(cell: nn.Cell, path: Iterable[str]) -> nn.Cell:
    for name in path:
        cell = cell[int(name)] if name.isdecimal() else getattr(cell, name)
    return cell
