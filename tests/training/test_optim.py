"""AdamW against torch.optim; the moving average against its definition."""

import cann
import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter

from ldm.training.masters import has_weight_decay
from ldm.training.optim import AdamW, FusedAdamW, MovingAverage, OperatorAdamW, Trainees

NAMES = ["layer.weight", "layer.bias", "norm.gamma", "norm.beta", "embedding_table"]


def test_norms_and_biases_are_not_decayed():
    assert [name for name in NAMES if has_weight_decay(name)] == ["layer.weight", "embedding_table"]


@pytest.mark.parametrize("kind", [AdamW, OperatorAdamW, FusedAdamW])
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_equal_torch(kind, decoupled, weight_decay, monkeypatch):
    cann.put_in_place(monkeypatch)
    rng = np.random.default_rng(0)
    start = [rng.standard_normal((5, 7)).astype(np.float32) for _ in NAMES]
    ours = [Parameter(ms.Tensor(value), name=name) for name, value in zip(NAMES, start)]
    theirs = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in start]
    groups = [
        {
            "params": [p for p, name in zip(theirs, NAMES) if has_weight_decay(name) is decayed],
            "weight_decay": weight_decay * decayed,
        }
        for decayed in (True, False)
    ]
    decayed = [has_weight_decay(name) for name in NAMES]
    optimizer = kind(Trainees.alike(ours, decayed), (0.9, 0.98), weight_decay, True, decoupled=decoupled)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-8
    )
    for step in range(1, 8):
        gradients = [
            (rng.standard_normal((5, 7)) * 10.0 ** rng.integers(-6, 1)).astype(np.float32) for _ in NAMES
        ]
        quarters = tuple(ms.Tensor(gradient / 4) for gradient in gradients)
        optimizer(quarters, ms.Tensor(4.0, ms.float32), *optimizer.scalars(step, 1e-2))
        for parameter, gradient in zip(theirs, gradients):
            parameter.grad = torch.from_numpy(gradient)
        reference.step()
    for a, b, before in zip(ours, theirs, start):
        moved, wanted = a.asnumpy() - before, b.detach().numpy() - before
        # a rounding of float32 weights about 1
        assert np.abs(moved - wanted).max() <= 1e-5 * np.abs(wanted).max() + 2e-7


def test_moving_average():
    parameter = Parameter(ms.Tensor(np.zeros(3, np.float32)), name="w")
    average = MovingAverage([parameter])
    expected = 0.0
    for n in range(1, 30):
        parameter.set_data(ms.Tensor(np.full(3, n, np.float32)))
        average.update(n)
        decay = min(0.9999, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert [own.name for own in average.average] == ["ema.w"] and parameter.name == "w"
    assert np.allclose(average.average[0].asnumpy(), expected, rtol=1e-5)
