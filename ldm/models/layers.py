"""Layers shared by the three networks, and every work-around for a slow or leaking kernel.

A layer takes the compute dtype when it is made: its weights stay float32 and are cast where they are used. Norms and
softmax compute in float32 and answer in the dtype they were given.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer

INV_SQRT2 = 0.5**0.5


def _weight(*shape: int) -> Parameter:
    return Parameter(initializer(HeUniform(math.sqrt(5)), shape, ms.float32), name="weight")


def _bias(size: int) -> Parameter:
    return Parameter(initializer("zeros", (size,), ms.float32), name="bias")


class Dense(nn.Cell):
    """y = x W^T + b on the last axis. Weight (out, in), bias (out,) or none."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True, dtype=ms.float32) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dtype, self.has_bias = dtype, has_bias
        self.weight = _weight(out_channels, in_channels)
        if has_bias:
            self.bias = _bias(out_channels)
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, x):
        y = self.matmul(x.astype(self.dtype).reshape(-1, self.in_channels), self.weight.astype(self.dtype))
        if self.has_bias:
            y = self.bias_add(y, self.bias.astype(self.dtype))
        return y.reshape(x.shape[:-1] + (self.out_channels,))


class Conv2d(nn.Cell):
    """Convolution with bias on (B, C, H, W). `padding` is one number, or (top, bottom, left, right)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding=0, dtype=ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = _weight(out_channels, in_channels, kernel, kernel)
        self.bias = _bias(out_channels)
        self.conv2d = ops.Conv2D(out_channels, kernel, pad_mode="pad", pad=padding, stride=stride)
        self.bias_add = ops.BiasAdd()

    def construct(self, x):
        y = self.conv2d(x.astype(self.dtype), self.weight.astype(self.dtype))
        return self.bias_add(y, self.bias.astype(self.dtype))


class GroupNorm(nn.Cell):
    """Group normalisation of (B, C, H, W) with learned scale and shift. Each place in the networks has its own epsilon."""

    def __init__(self, groups: int, channels: int, epsilon: float) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.gamma = Parameter(initializer("ones", (channels,), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,), ms.float32), name="beta")

    def construct(self, x):
        y = ops.group_norm(x.astype(ms.float32), self.groups, self.gamma, self.beta, self.epsilon)
        return y.astype(x.dtype)


class LayerNorm(nn.Cell):
    """Normalisation of the last axis with learned scale and shift."""

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=epsilon)
        self.gamma = Parameter(initializer("ones", (channels,), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,), ms.float32), name="beta")

    def construct(self, x):
        return self.norm(x.astype(ms.float32), self.gamma, self.beta)[0].astype(x.dtype)


def gelu(x):
    """Exact GELU (Hendrycks & Gimpel 2016)."""
    # ops.gelu divides, and RealDiv keeps 16 bytes per element for good on CPU: 5.6 GB at (4, 2048, 2048). Same values.
    return x * (ops.erf(x * INV_SQRT2) * 0.5 + 0.5)


class AddPerChannel(nn.Cell):
    """(B, C, H, W) + (B, C): a vector for each sample, added at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_add = ops.BiasAdd()

    def construct(self, x, vector):
        # A broadcasting Add keeps an index table of 16 bytes per element for good on CPU; BiasAdd keeps none. Same values.
        batch, channels, height, width = x.shape
        joined = self.bias_add(x.reshape(1, batch * channels, height, width), vector.reshape(-1))
        return joined.reshape(batch, channels, height, width)


def upsample_nearest(x):
    """(B, C, H, W) to (B, C, 2H, 2W), each value four times."""
    # 20 ms against 43 for ops.interpolate at (2, 640, 32, 32) on CPU, forward + backward 76 against 145. Same values.
    batch, channels, height, width = x.shape
    wide = ops.broadcast_to(x.reshape(batch, channels, height, 1, width, 1), (batch, channels, height, 2, width, 2))
    return wide.reshape(batch, channels, 2 * height, 2 * width)


class SoftmaxAttention(nn.Cell):
    """softmax(q k^T + mask) v on (B, heads, N, d), with the softmax in float32 and a backward pass of its own.

    The backward pass recomputes the probabilities, chunk by chunk over the queries, and never keeps (heads, N, M). The
    gradient of a softmax subtracts a column, D = rowsum(dO * O), and a broadcasting subtraction keeps 16 bytes for each
    score for good on CPU; here it rides in a matrix product: dO V^T - D = [dO, -D] [V, 1]^T. Measured on 2 cores with
    AVX-512, (2, 5, 4096, 64), forward + backward: 0.82 s and 1.9 GB against 1.5 s and 5.7 GB with MindSpore's gradient.

    Args:
        chunk_bytes: the scores of a chunk take at most this (float32), as far as halving the queries gets there.
        causal, length: position i of `length` sees positions 0 to i only.
    """

    def __init__(self, causal: bool = False, length: int = 0, chunk_bytes: int = 64 << 20) -> None:
        super().__init__()
        self.chunk_bytes, self.causal = chunk_bytes, causal
        if causal:
            self.mask = Tensor(np.triu(np.full((1, 1, length, length), np.finfo(np.float32).min), 1))
        # Primitives made here: their functional forms do not compile inside a bprop.
        self.times_transposed = ops.BatchMatMul(transpose_b=True)
        self.transposed_times = ops.BatchMatMul(transpose_a=True)
        self.times = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)
        self.join_columns, self.join_rows = ops.Concat(-1), ops.Concat(2)
        self.row_sum = ops.ReduceSum(keep_dims=True)
        self.ones_like = ops.OnesLike()
        self.zeros_like = ops.ZerosLike()

    def chunks(self, q, k):
        """The number of equal chunks that the queries are cut into."""
        count = 1
        scores = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        while not self.causal and scores > count * self.chunk_bytes and q.shape[2] % (2 * count) == 0:
            count = 2 * count
        return count

    def probabilities(self, q, k):
        scores = self.times_transposed(q, k).astype(ms.float32)
        if self.causal:
            scores = scores + self.mask
        return self.softmax(scores)

    def construct(self, q, k, v):
        count = self.chunks(q, k)
        size = q.shape[2] // count
        outputs = ()
        for i in range(count):
            p = self.probabilities(q[:, :, i * size : (i + 1) * size], k)
            outputs = outputs + (self.times(p.astype(v.dtype), v),)
        return self.join_rows(outputs)

    def bprop(self, q, k, v, out, dout):
        count = self.chunks(q, k)
        size = q.shape[2] // count
        v_1 = self.join_columns((v, self.ones_like(v[:, :, :, :1])))
        dout_d = self.join_columns((dout, -self.row_sum(dout * out, -1)))
        dq, dk, dv = (), self.zeros_like(k), self.zeros_like(v)
        for i in range(count):
            start, stop = i * size, (i + 1) * size
            p = self.probabilities(q[:, :, start:stop], k)
            ds = (p * self.times_transposed(dout_d[:, :, start:stop], v_1).astype(ms.float32)).astype(q.dtype)
            dq = dq + (self.times(ds, k),)
            dk = dk + self.transposed_times(ds, q[:, :, start:stop])
            dv = dv + self.transposed_times(p.astype(v.dtype), dout[:, :, start:stop])
        return self.join_rows(dq), dk, dv


class Attention(nn.Cell):
    """Multi-head attention on q (B, N, heads * d), k and v (B, M, heads * d): softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    With `causal`, N and M are `length` and position i sees positions 0 to i only.
    """

    def __init__(self, heads: int, causal: bool = False, length: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.softmax_attention = SoftmaxAttention(causal, length)

    def split(self, x):
        batch, length, channels = x.shape
        return x.reshape(batch, length, self.heads, channels // self.heads).transpose(0, 2, 1, 3)  # (B, heads, N, d)

    def construct(self, q, k, v):
        batch, length, channels = q.shape
        q = q * (channels // self.heads) ** -0.5
        mixed = self.softmax_attention(self.split(q), self.split(k), self.split(v))
        return mixed.transpose(0, 2, 1, 3).reshape(batch, length, channels)
