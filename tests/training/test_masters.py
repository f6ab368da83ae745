"""Joined float32 masters: what is joined, and that names and values come back as they were."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter

from ldm.training import masters
from ldm.training.masters import Masters

SHAPES = {
    "a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 3), "b.bias": (2,), "conv.weight": (2, 3, 1, 1),
    "norm.gamma": (5,), "norm.beta": (5,), "c.weight": (6, 3), "d.weight": (3, 7),
}  # fmt: skip
NORMS = ("norm.gamma", "norm.beta")


def parameters() -> list[Parameter]:
    rng = np.random.default_rng(0)
    return [
        Parameter(ms.Tensor(rng.standard_normal(shape).astype(np.float32)), name=name)
        for name, shape in SHAPES.items()
    ]


def halves(own) -> list[Parameter]:
    return [parameter for parameter in own if parameter.name not in NORMS]


def test_what_differs_in_its_first_side_only_is_joined(monkeypatch):
    own = parameters()
    joined = Masters(own, joins=True, halved=halves(own), dtype=ms.float16)
    groups = {tuple(own[place].name for place in group) for group in joined.groups}
    assert groups == {
        ("a.weight", "b.weight", "c.weight"), ("a.bias", "b.bias"), ("conv.weight",), NORMS, ("d.weight",)
    }  # fmt: skip
    kinds = {names[0]: decays for names, decays in zip(map(sorted, groups), joined.decayed)}
    assert len(kinds) == len(joined.trained) == 5
    for group, decays, dtype in zip(joined.groups, joined.decayed, joined.gradient_dtypes):
        name = own[group[0]].name
        assert decays == name.endswith("weight") and dtype == (ms.float32 if name in NORMS else ms.float16)
    monkeypatch.setattr(masters, "MOST", 2)
    monkeypatch.setattr(masters, "LARGEST", 9)
    assert all(
        len(group) <= 2 and (len(group) == 1 or sum(own[place].size for place in group) <= 9)
        for group in Masters(parameters(), joins=True).groups
    )


def test_gradients_and_values_find_their_way():
    own = parameters()
    before = {parameter.name: parameter.asnumpy().copy() for parameter in own}
    joined = Masters(own, joins=True, halved=halves(own), dtype=ms.float16)
    assert {p.name: p.dtype for p in own} == {
        name: ms.float32 if name in NORMS else ms.float16 for name in SHAPES
    }
    assert all(np.array_equal(value, before[name]) for name, value in joined.named(joined.trained).items())

    class Join(ms.nn.Cell):
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.masters = joined

        def construct(self, gradients):
            return self.masters.join(gradients)

    gradients = tuple(ms.Tensor(before[name] * 2) for name in SHAPES)
    for gradient, master in zip(Join()(gradients), joined.trained, strict=True):
        assert np.array_equal(gradient.asnumpy(), master.asnumpy() * 2)
    for master in joined.trained:
        master.set_data(ms.Tensor(master.asnumpy() + 1))
    joined.follow()
    for parameter in own:
        expected = (before[parameter.name] + 1).astype(np.float32)
        assert np.array_equal(parameter.asnumpy(), ms.Tensor(expected).astype(parameter.dtype).asnumpy())
    joined.fill(joined.trained, before)
    assert all(np.array_equal(value, before[name]) for name, value in joined.named(joined.trained).items())
    assert np.array_equal(own[0].asnumpy(), before["a.weight"].astype(np.float16))


@pytest.mark.parametrize("joins", [True, False])
def test_names_and_shapes_are_those_of_the_parameters(joins):
    held = Masters(parameters(), joins=joins)
    assert held.shapes(held.trained, "ema.") == {f"ema.{name}": shape for name, shape in SHAPES.items()}
    named = held.named(held.trained, "adam_m.")
    assert {name: tuple(value.shape) for name, value in named.items()} == held.shapes(held.trained, "adam_m.")
