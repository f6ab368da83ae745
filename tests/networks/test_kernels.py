"""The work-arounds against PyTorch's own operators: equal values and gradients."""

import mindspore as ms
import numpy as np
import pytest
import torch
from conftest import relative_error
from mindspore import nn, ops

from ldm.networks.convolution import MatmulConv, UpsampledConv
from ldm.networks.kernels import (
    GELU,
    AddBias,
    AddPerChannel,
    GatedGELU,
    MergeHeads,
    Normalise,
    RowSum,
    ScaleAndShift,
    ScaleShiftSiLU,
    SplitHeads,
    upsample_nearest,
)
from ldm.networks.softmax_attention import SoftmaxAttention


class Function(nn.Cell):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def construct(self, x):
        return self.function(x)


class First(nn.Cell):
    """A cell's first output: the others are for its gradient."""

    def __init__(self, cell) -> None:
        super().__init__()
        self.cell = cell

    def construct(self, x):
        return self.cell(x)[0]


class Gradients(nn.Cell):
    """Gradients of a cell with respect to all its inputs; the last argument weights its output."""

    def __init__(self, cell) -> None:
        super().__init__()
        self.cell = cell
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs_and_weight):
        return self.gradient(self.cell)(*inputs_and_weight)


def compare(cell, reference, *shapes, tolerance=2e-6):
    """Values and gradients of a cell and of a PyTorch function on random inputs."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    tensors = [torch.from_numpy(array).requires_grad_() for array in inputs]
    theirs = reference(*tensors)
    weight = rng.standard_normal(theirs.shape).astype(np.float32)
    theirs.backward(torch.from_numpy(weight))
    ours = cell(*map(ms.Tensor, inputs))
    gradients = Gradients(cell)(*map(ms.Tensor, inputs), ms.Tensor(weight))
    assert relative_error(ours.asnumpy(), theirs) <= tolerance
    assert len(gradients) == len(tensors)
    for gradient, tensor in zip(gradients, tensors):
        assert relative_error(gradient.asnumpy(), tensor.grad) <= tolerance


def test_gelu():
    compare(First(GELU()), torch.nn.functional.gelu, (3, 5, 40))


def test_gated_gelu():
    def reference(x):
        value, gate = x.chunk(2, -1)
        return value * torch.nn.functional.gelu(gate)

    compare(First(GatedGELU()), reference, (7, 40))


def test_heads():
    compare(SplitHeads(3), lambda x: x.reshape(2, 5, 3, 4).transpose(1, 2), (2, 5, 12))
    compare(MergeHeads(3), lambda x: x.transpose(1, 2).reshape(2, 5, 12), (2, 3, 5, 4))


def test_upsample_nearest():
    compare(
        Function(upsample_nearest),
        lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0),
        (2, 3, 4, 5),
    )


def test_add_per_channel():
    compare(AddPerChannel(), lambda x, vector: x + vector[:, :, None, None], (2, 3, 4, 5), (2, 3))


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 4 * 2 * 3 * 8 * 20], ids=["whole", "in_chunks"])
def test_attention(chunk_bytes):
    cell = SoftmaxAttention(chunk_bytes=chunk_bytes)
    q, k = ms.Tensor(np.zeros((2, 3, 32, 8), np.float32)), ms.Tensor(np.zeros((2, 3, 20, 8), np.float32))
    assert cell.chunks(q, k) == (1 if chunk_bytes > 1e6 else 4)
    compare(
        cell,
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0),
        (2, 3, 32, 8),
        (2, 3, 20, 8),
        (2, 3, 20, 8),
    )


def test_causal_attention():
    def reference(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

    compare(SoftmaxAttention(causal=True, length=11), reference, (2, 3, 11, 8), (2, 3, 11, 8), (2, 3, 11, 8))


def test_add_bias():
    compare(AddBias(), lambda x, bias: x + bias, (7, 5), (5,))


def test_row_sum():
    compare(RowSum(), lambda x: x.sum(0), (7, 5))


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("channels, inputs", [(5, 3), (70, 420)], ids=["batched", "by_sample"])
@pytest.mark.parametrize("columns_bytes", [1 << 30, 2000], ids=["whole", "in_bands"])
def test_matmul_conv(stride, padding, channels, inputs, columns_bytes):
    cell = MatmulConv(channels, stride, padding, columns_bytes)

    def reference(x, weight):
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)

    shapes = (2, inputs, 9 if padding == 0 else 8, 9), (channels, inputs, 3, 3)
    # sums over batch and places in another order: some last places of a float32
    compare(cell, reference, *shapes, tolerance=5e-6)


@pytest.mark.parametrize("shape", [(1, 6, 4, 5), (1, 10, 7, 1)], ids=["groups", "rows"])
def test_normalise(shape):
    compare(
        First(Normalise(1e-5)),
        lambda x: torch.nn.functional.layer_norm(x, x.shape[2:], eps=1e-5),
        shape,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (7, 6, 1, 1)], ids=["map", "rows"])
def test_scale_and_shift(shape):
    def reference(x, gamma, beta):
        return x * gamma[:, None, None] + beta[:, None, None]

    compare(ScaleAndShift(), reference, shape, (6,), (6,))


def test_scale_shift_silu():
    def reference(x, gamma, beta):
        return torch.nn.functional.silu(x * gamma[:, None, None] + beta[:, None, None])

    compare(ScaleShiftSiLU(), reference, (2, 6, 4, 5), (6,), (6,))


def test_upsampled_conv():
    def reference(x, weight):
        return torch.nn.functional.conv2d(
            torch.nn.functional.interpolate(x, scale_factor=2.0), weight, padding=1
        )

    # weights are added before they are multiplied: some last places of a float32
    compare(UpsampledConv(4), reference, (2, 3, 5, 6), (4, 3, 3, 3), tolerance=5e-6)
