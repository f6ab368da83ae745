"""Adafactor, Lion and Prodigy against transformers', lion-pytorch's and prodigyopt's."""

import dataclasses

import mindspore as ms
import numpy as np
import prodigyopt
import pytest
import torch
from lion_pytorch import Lion as TorchLion
from mindspore import Parameter
from transformers.optimization import Adafactor as TorchAdafactor

from ldm.options import TrainOptions
from ldm.training.masters import has_weight_decay
from ldm.training.optim import Trainees
from ldm.training.other_optimizers import make_optimizer

SHAPES = {
    "layer.weight": (5, 7), "layer.bias": (5,), "norm.gamma": (5,), "conv.weight": (6, 4, 3, 3),
    "embedding_table": (9, 5),
}  # fmt: skip
STEPS, RATE, DECAY = 20, 1e-2, 0.1
OTHERS = {"adafactor": TorchAdafactor, "lion": TorchLion, "prodigy": prodigyopt.Prodigy}
SETTINGS = {
    "adafactor": {"scale_parameter": False, "relative_step": False},
    "lion": {"betas": (0.9, 0.99)},
    "prodigy": {"betas": (0.9, 0.999)},
}


def run(kind, ratio=1.0, steps=STEPS, weights_decay=DECAY):
    """Ours and theirs after the same gradients; and the optimizer."""
    rng, rate = np.random.default_rng(0), 1.0 if kind == "prodigy" else RATE
    start = {name: 0.1 * rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    ours = [Parameter(ms.Tensor(value), name=name) for name, value in start.items()]
    # a kernel counts as a matrix here, which changes nothing for the other two
    matrices = {
        name: value.reshape(len(value), -1) if value.ndim > 2 else value for name, value in start.items()
    }
    theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in matrices.items()}
    slow = [name for name in SHAPES if name.startswith("conv")]
    groups = [
        {"params": [parameter], "weight_decay": weights_decay * has_weight_decay(name),
         "lr": rate * (ratio if name in slow else 1)}
        for name, parameter in theirs.items()
    ]  # fmt: skip
    reference = OTHERS[kind](groups, lr=rate, **SETTINGS[kind])
    decayed = [has_weight_decay(name) for name in SHAPES]
    trained = Trainees(ours, decayed, [int(name in slow) for name in SHAPES], (1.0, ratio))
    optimizer = make_optimizer(TrainOptions(optim=kind, weight_decay=weights_decay), trained, scales=True)
    along = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}  # a way that leads somewhere
    for step in range(1, steps + 1):
        gradients = {
            name: (way + 0.5 * rng.standard_normal(way.shape)).astype(np.float32)
            for name, way in along.items()
        }
        halves = tuple(ms.Tensor(gradient / 2) for gradient in gradients.values())
        optimizer(halves, ms.Tensor(2.0, ms.float32), *optimizer.scalars(step, rate))
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(gradients[name].reshape(parameter.shape))
        reference.step()
    moved = {p.name: p.asnumpy() - start[p.name] for p in ours}
    wanted = {name: p.detach().numpy().reshape(SHAPES[name]) - start[name] for name, p in theirs.items()}
    return moved, wanted, optimizer, reference


@pytest.mark.parametrize("kind, ratio", [("adafactor", 0.25), ("lion", 0.25), ("prodigy", 1.0)])
def test_twenty_steps_equal_those_of_the_library(kind, ratio):
    moved, wanted, optimizer, reference = run(kind, ratio)
    for name in SHAPES:
        error = np.abs(moved[name] - wanted[name]).max()
        print(f"{kind} {name}: {error:.1e} of {np.abs(wanted[name]).max():.1e}")
        # Prodigy's first estimates are of weights about 0.1 that moved by 1e-6: of float32's roundings
        relative = 2e-4 if kind == "prodigy" else 2e-6
        assert error <= relative * np.abs(wanted[name]).max()
    if kind == "prodigy":
        found, theirs = optimizer.counters()["prodigy_distance"][0], reference.param_groups[0]["d"]
        assert found > 1e-6 and abs(found / theirs - 1) < 2e-4


def test_what_is_kept():
    """Values that the optimizers keep, beside the weights: AdamW twice as many."""
    sizes = {}
    for kind in ("adamw", *OTHERS):
        weights = [Parameter(ms.Tensor(np.ones((320, 320), np.float32)), name="layer.weight")]
        optimizer = make_optimizer(TrainOptions(optim=kind), Trainees.alike(weights, [True]), scales=False)
        sizes[kind] = sum(array.size for arrays in optimizer.arrays.values() for array in arrays) / 320**2
    assert sizes == {"adamw": 2, "adafactor": 2 / 320, "lion": 1, "prodigy": 4}


def test_defaults_of_each():
    assert TrainOptions().betas == TrainOptions(optim="prodigy").betas == (0.9, 0.999)
    assert TrainOptions(optim="lion").betas == (0.9, 0.99)
    rates = {kind: TrainOptions(optim=kind).start_learning_rate for kind in ("adamw", *OTHERS)}
    assert rates == {"adamw": 5e-6, "adafactor": 5e-6, "lion": 5e-6, "prodigy": 1.0}
    assert dataclasses.replace(TrainOptions(), optim="lion").betas == (0.9, 0.999)  # given by then


@pytest.mark.parametrize("kind", OTHERS)
def test_a_part_goes_on_with_what_is_kept_of_it(kind):
    """As a training does whose text encoder is frozen: the others move as they would have."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((4, 3)).astype(np.float32) for _ in range(3)]
    options = TrainOptions(optim=kind, start_learning_rate=0.1)

    def start():
        weights = [Parameter(ms.Tensor(value), name=f"w{place}") for place, value in enumerate(values)]
        return weights, make_optimizer(options, Trainees.alike(weights, [True] * 3), scales=False)

    (whole, one), (parts, other) = start(), start()
    gradients = tuple(ms.Tensor(value[::-1].copy()) for value in values)
    none = ms.Tensor(1.0, ms.float32)
    for optimizer in (one, other):
        optimizer(gradients, none, *optimizer.scalars(1, 0.1))
    part = other.part([0, 2])
    if kind == "prodigy":  # whose estimate is of all that are trained
        part(gradients[::2], none, *part.scalars(2, 0.1))
        assert part.distance is other.distance and not np.array_equal(parts[0].asnumpy(), whole[0].asnumpy())
        return
    one(gradients, none, *one.scalars(2, 0.1)), part(gradients[::2], none, *part.scalars(2, 0.1))
    for place in (0, 2):
        assert np.array_equal(parts[place].asnumpy(), whole[place].asnumpy())
    assert not np.array_equal(parts[1].asnumpy(), whole[1].asnumpy())
