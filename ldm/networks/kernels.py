"""Every work-around for a slow or leaking kernel of MindSpore's CPU back end, each with its measurement.

The convolution has a module of its own; GELU and GatedGELU serve an accelerator, too. Cells
without parameters and functions; `layers` puts them behind the layers of the networks. Where two forms exist,
`layers` chooses: other devices take MindSpore's own operators. Times are of 2 cores with AVX-512, MindSpore
2.10, in ms, forward / forward + backward where there are two.
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops.operations import _grad_ops

INV_SQRT2 = 0.5**0.5
INV_SQRT_2PI = (2 * np.pi) ** -0.5


def normal_density(x):
    """exp(-x^2 / 2) / sqrt(2 pi), by way of float32: in float16 x^2 is infinite beyond 256, which the first
    Ascend 910 takes for an overflow of the gradients, whatever comes of it.
    """
    # no branch on the dtype: MindSpore loses the branches of a function that two gradients call, one of them
    # within another (the text encoder's, and that of --recompute)
    wide = x.astype(ms.float32)
    return (ops.exp(wide * wide * -0.5) * INV_SQRT_2PI).astype(x.dtype)


class GELU(nn.Cell):
    """Exact GELU (Hendrycks & Gimpel 2016): x times the normal distribution function at x.

    ops.gelu divides, and RealDiv never frees 16 bytes per element on CPU: 5.6 GB at (4, 2048, 2048); the
    gradient of erf keeps as much for its Pow. Here nothing is kept, and the gradient needs no second erf, the
    most expensive part (7 ns a value).
    """

    def __init__(self) -> None:
        super().__init__()
        self.erf = ops.Erf()

    def construct(self, x):
        """GELU, and the distribution function for the gradient."""
        cdf = self.erf(x * INV_SQRT2) * 0.5 + 0.5
        return x * cdf, cdf

    def bprop(self, x, out, dout):
        x = ops.depend(x, dout[0])
        pdf = normal_density(x)
        return (dout[0] * (out[1] + x * pdf),)


class GatedGELU(nn.Cell):
    """(rows, 2 n) to (rows, n): the first half times the GELU of the second (GEGLU, Shazeer 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.halves, self.join = ops.Split(-1, 2), ops.Concat(-1)
        self.gelu = GELU()

    def construct(self, x):
        """The gated half, and the distribution function for the gradient."""
        value, gate = self.halves(x)
        activated, cdf = self.gelu(gate)
        return value * activated, cdf

    def bprop(self, x, out, dout):
        cdf, dy = out[1], dout[0]
        value, gate = self.halves(ops.depend(x, dy))
        pdf = normal_density(gate)
        return (self.join((dy * gate * cdf, dy * value * (cdf + gate * pdf))),)


class SplitHeads(nn.Cell):
    """(B, N, heads * d) to (B, heads, N, d)."""

    # Split and Concat: half the time of Transpose, which never frees 8 bytes per element.
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.split_channels, self.join_heads = ops.Split(-1, heads), ops.Concat(1)
        self.split_heads, self.join_channels = ops.Split(1, heads), ops.Concat(-1)
        self.heads = heads

    def split(self, x):
        batch, length, channels = x.shape
        parts = ()
        for part in self.split_channels(x):
            parts = parts + (part.reshape(batch, 1, length, channels // self.heads),)
        return self.join_heads(parts)

    def merge(self, x):
        parts = ()
        for part in self.split_heads(x):
            parts = parts + (part.reshape(x.shape[0], x.shape[2], x.shape[3]),)
        return self.join_channels(parts)

    def construct(self, x):
        return self.split(x)

    def bprop(self, x, out, dout):
        return (self.merge(dout),)


class MergeHeads(SplitHeads):
    """(B, heads, N, d) to (B, N, heads * d)."""

    def construct(self, x):
        return self.merge(x)

    def bprop(self, x, out, dout):
        return (self.split(dout),)


def upsample_nearest(x):
    """(B, C, H, W) to (B, C, 2H, 2W), each value four times."""
    # 20 ms against 43 for ops.interpolate at (2, 640, 32, 32) on CPU, forward + backward 76 against 145. Same
    # values.
    batch, channels, height, width = x.shape
    wide = ops.broadcast_to(
        x.reshape(batch, channels, height, 1, width, 1), (batch, channels, height, 2, width, 2)
    )
    return wide.reshape(batch, channels, 2 * height, 2 * width)


class AddPerChannel(nn.Cell):
    """(B, C, H, W) + (B, C): a vector for each sample, added at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_add = ops.BiasAdd()

    def construct(self, x, vector):
        # A broadcasting Add never frees an index table of 16 bytes per element on CPU; BiasAdd keeps none.
        # Same values.
        batch, channels, height, width = x.shape
        joined = self.bias_add(x.reshape(1, batch * channels, height, width), vector.reshape(-1))
        return joined.reshape(batch, channels, height, width)


class RowSum(nn.Cell):
    """(rows, columns) to (columns,): the sum over the rows."""

    # As a product with ones: (8192, 2560) 3 ms, against 13 with ReduceSum and 61 with BiasAddGrad.
    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul()

    def construct(self, x):
        ones = ops.ones((1, x.shape[0]), x.dtype)
        return self.matmul(ones, x).reshape(-1)


class AddBias(nn.Cell):
    """(rows, columns) + (columns,), with RowSum as the gradient of the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_add = ops.BiasAdd()
        self.row_sum = RowSum()

    def construct(self, x, bias):
        return self.bias_add(x, bias)

    def bprop(self, x, bias, out, dout):
        return dout, self.row_sum(dout)


class Normalise(nn.Cell):
    """(1, rows, H, W): zero mean and unit variance in each row, with BatchNorm's training kernel.

    (2, 320, 64, 64) in 64 groups 3 / 5, against 22 / 41 with nn.GroupNorm; (8192, 320) 2 / 8, against 7 / 34
    with LayerNorm. The gradient starts from the output y, which what follows keeps anyway: dx = rstd (dy -
    mean(dy) - y mean(dy y)), as the kernel computes for an input y of mean 0 and variance 1 and a scale of
    rstd = 1 / sqrt(variance + epsilon).
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        # momentum 0: the running statistics that the kernel writes in place stay the constants that they are
        # here
        self.batch_norm = ops.BatchNorm(is_training=True, epsilon=epsilon, momentum=0.0)
        self.gradient = _grad_ops.BatchNormGrad(is_training=True, epsilon=epsilon)
        self.rsqrt, self.ones_like, self.zeros_like = ops.Rsqrt(), ops.OnesLike(), ops.ZerosLike()

    def construct(self, x):
        """The normalised rows, and rstd (rows,)."""
        ones, zeros = ops.ones((x.shape[1],), ms.float32), ops.zeros((x.shape[1],), ms.float32)
        y, _, _, _, variance = self.batch_norm(x, ones, zeros, zeros, ones)
        return y, self.rsqrt(variance + self.epsilon)

    def bprop(self, x, out, dout):
        y, rstd = out
        zeros = self.zeros_like(rstd)
        return (self.gradient(dout[0], y, rstd, zeros, self.ones_like(rstd) - self.epsilon, zeros)[0],)


class ScaleAndShift(nn.Cell):
    """x * gamma + beta along axis 1 of (B, C, H, W), with BatchNorm's inference kernel: a broadcasting Mul
    would leak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = ops.BatchNorm(is_training=False, epsilon=1e-12)  # the variance given is 1
        self.bias_gradient = _grad_ops.BiasAddGrad()
        self.row_sum = RowSum()
        self.zeros_like, self.ones_like = ops.ZerosLike(), ops.OnesLike()

    def construct(self, x, gamma, beta):
        zeros, ones = self.zeros_like(gamma), self.ones_like(gamma)
        return self.batch_norm(x, gamma, beta, zeros, ones)[0]

    def channel_sum(self, x):
        if x.shape[2] * x.shape[3] == 1:
            return self.row_sum(x.reshape(x.shape[0], x.shape[1]))
        return self.bias_gradient(x)

    def bprop(self, x, gamma, beta, out, dout):
        zeros, ones = self.zeros_like(gamma), self.ones_like(gamma)
        dx = self.batch_norm(dout, gamma, zeros, zeros, ones)[0]
        return dx, self.channel_sum(dout * x), self.channel_sum(dout)


class ScaleShiftSiLU(ScaleAndShift):
    """SiLU of ScaleAndShift, which keeps its input alone for the backward pass instead of four maps of that
    size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = ops.Sigmoid()

    def construct(self, x, gamma, beta):
        y = self.batch_norm(x, gamma, beta, self.zeros_like(gamma), self.ones_like(gamma))[0]
        return y * self.sigmoid(y)

    def bprop(self, x, gamma, beta, out, dout):
        zeros, ones = self.zeros_like(gamma), self.ones_like(gamma)
        # the dependence keeps MindSpore from finding y already computed in the forward pass, and from keeping
        # it
        y = self.batch_norm(ops.depend(x, dout), gamma, beta, zeros, ones)[0]
        s = self.sigmoid(y)
        dy = dout * (s + out * (1 - s))
        return (
            self.batch_norm(dy, gamma, zeros, zeros, ones)[0],
            self.channel_sum(dy * x),
            self.channel_sum(dy),
        )
