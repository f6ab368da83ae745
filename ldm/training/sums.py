"""Sums over all values of an array that have the same bits in every update.

Where there are more than about 150,000, MindSpore's CPU kernel adds up 1, 2, 4 and more parts of them in
its first launches, and goes on as was fastest: last bits depend on how many updates a process has done, and
on the clock. A product with ones has no such search.
"""

from mindspore import nn

from ldm.device import is_on_cpu
from ldm.networks.kernels import RowSum


class _InTwoSteps(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.row_sum = RowSum()

    def construct(self, values):
        # without a branch: in a map that also puts values, MindSpore compiles none
        return self.row_sum(values.reshape(values.shape[0], -1)).sum()


def _in_one(values):
    return values.sum()


def sum_of_all():
    """The function that adds up float32 values; on 29 million, in two steps takes 17 ms, at once 95.

    Not on an accelerator: the first Ascend 910 multiplies matrices in float16.
    """
    return _InTwoSteps() if is_on_cpu() else _in_one
