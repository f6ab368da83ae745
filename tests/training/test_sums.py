"""Sums of many values: the same bits in every launch."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.training.sums import sum_of_all


class Total(nn.Cell):
    def __init__(self, add_up) -> None:
        super().__init__()
        self.add_up = add_up

    def construct(self, values):
        return self.add_up(values)


def by_the_kernel(values):
    return values.sum()


def in_fifty_launches(cell, values) -> set[float]:
    return {float(cell(Tensor(values)).asnumpy()) for _ in range(50)}


@pytest.mark.parametrize("shape", [(1_000_003,), (1280, 640, 3, 3), (40_000,), (1,)], ids=str)
def test_a_sum_has_the_same_bits_in_every_launch(shape):
    rng = np.random.default_rng(3)
    for _ in range(3):
        values = rng.normal(size=shape).astype(np.float32) ** 2
        (found,) = in_fifty_launches(Total(sum_of_all()), values)
        # float32's rounding of partial sums: 1e-6 for 7 million
        assert found == pytest.approx(values.sum(dtype=np.float64), rel=2e-6)


def test_which_the_kernel_does_not_promise():
    """As long as MindSpore's own sum has several values, `sum_of_all` has its reason."""
    rng = np.random.default_rng(3)
    arrays = [rng.normal(size=1_000_003).astype(np.float32) for _ in range(8)]
    assert max(len(in_fifty_launches(Total(by_the_kernel), values)) for values in arrays) > 1
