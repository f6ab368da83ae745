"""The layers of the three networks. `layers_cpu` and `layers_ascend` have the same ones by other kernels.

A layer takes the compute dtype when it is made: its weights stay float32 and are cast where they are used.
Norms and softmax compute in float32 and answer in the dtype they were given. `layer_set` chooses.
"""

import math

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer

from ldm.networks.kernels import GELU as GELUKernel
from ldm.networks.kernels import GatedGELU as GatedGELUKernel
from ldm.networks.kernels import upsample_nearest
from ldm.networks.softmax_attention import SoftmaxAttention

CHUNK_BYTES = 256 << 20  # of the scores of an attention that is not fused; more chunks are more kernels


def weight(*shape: int) -> Parameter:
    return Parameter(initializer(HeUniform(math.sqrt(5)), shape, ms.float32), name="weight")


def bias(size: int) -> Parameter:
    return Parameter(initializer("zeros", (size,), ms.float32), name="bias")


class Dense(nn.Cell):
    """y = x W^T + b on the last axis. Weight (out, in), bias (out,) or none."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True, dtype=ms.float32) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dtype, self.has_bias = dtype, has_bias
        self.weight = weight(out_channels, in_channels)
        if has_bias:
            self.bias = bias(out_channels)
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, x):
        return self.apply(x, self.weight, self.bias if self.has_bias else None)

    def apply(self, x, weight, bias=None):
        """The layer with a weight and a bias that are given."""
        y = self.matmul(x.astype(self.dtype).reshape(-1, self.in_channels), weight.astype(self.dtype))
        return self.biased(y, bias).reshape(x.shape[:-1] + (self.out_channels,))

    def biased(self, y, bias):
        return self.bias_add(y, bias.astype(self.dtype)) if self.has_bias else y

    def weights(self):
        """What `apply` takes behind x."""
        return (self.weight, self.bias) if self.has_bias else (self.weight,)


class PlacesToTokens(Dense):
    """A Dense layer over the channels of (B, C, H, W), with the answer as tokens (B, H*W, out).

    Its weight has the shape of a 1x1 convolution's, (out, in, 1, 1), where the checkpoint has it so.
    """

    def __init__(
        self, in_channels: int, out_channels: int, is_linear: bool = True, has_bias: bool = True,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, has_bias, dtype)
        if not is_linear:
            self.weight = weight(out_channels, in_channels, 1, 1)

    def construct(self, x):
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels, height * width).transpose(0, 2, 1)
        return self.apply(x, self.matrix(), self.bias if self.has_bias else None)

    def matrix(self):
        return self.weight.reshape(self.out_channels, self.in_channels)


class TokensToPlaces(PlacesToTokens):
    """A Dense layer on tokens (B, H*W, in), with the answer as places (B, out, H, W)."""

    def construct(self, x, height, width):
        y = self.apply(x, self.matrix(), self.bias if self.has_bias else None)
        return y.transpose(0, 2, 1).reshape(x.shape[0], self.out_channels, height, width)


class Conv2d(nn.Cell):
    """Convolution on (B, C, H, W). `padding` is one number, or (top, bottom, left, right)."""

    def __init__(  # noqa: PLR0913
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding=0,
        has_bias: bool = True, dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.dtype, self.has_bias = dtype, has_bias
        self.weight = weight(out_channels, in_channels, kernel, kernel)
        if has_bias:
            self.bias = bias(out_channels)
        self.conv2d = ops.Conv2D(out_channels, kernel, pad_mode="pad", pad=padding, stride=stride)
        self.bias_add = ops.BiasAdd()

    def construct(self, x):
        return self.biased(self.conv2d(x.astype(self.dtype), self.weight.astype(self.dtype)))

    def biased(self, y):
        return self.bias_add(y, self.bias.astype(self.dtype)) if self.has_bias else y


class UpsampledConv2d(Conv2d):
    """Nearest up-sampling of (B, C, H, W) to twice the size, then a 3x3 convolution."""

    def __init__(self, channels: int, dtype=ms.float32) -> None:
        super().__init__(channels, channels, 3, padding=1, dtype=dtype)

    def construct(self, x):
        return super().construct(upsample_nearest(x))


class GroupNorm(nn.Cell):
    """Group normalisation of (B, C, H, W) with learned scale and shift.

    Each place in the networks has its own epsilon.
    """

    def __init__(self, groups: int, channels: int, epsilon: float) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.gamma = Parameter(initializer("ones", (channels,), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,), ms.float32), name="beta")

    def construct(self, x):
        return ops.group_norm(x.astype(ms.float32), self.groups, self.gamma, self.beta, self.epsilon).astype(
            x.dtype
        )


class GroupNormSiLU(GroupNorm):
    """Group normalisation, then SiLU."""

    def construct(self, x):
        return ops.silu(super().construct(x))


class LayerNorm(nn.Cell):
    """Normalisation of the last axis with learned scale and shift."""

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=epsilon)
        self.gamma = Parameter(initializer("ones", (channels,), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,), ms.float32), name="beta")

    def construct(self, x):
        return self.apply(x, self.gamma, self.beta)

    def apply(self, x, gamma, beta):
        """The layer with a scale and a shift that are given."""
        return self.norm(x.astype(ms.float32), gamma, beta)[0].astype(x.dtype)

    def weights(self):
        return self.gamma, self.beta


class GELU(nn.Cell):
    """x times the normal distribution function at x (Hendrycks & Gimpel 2016), not approximated by tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = GELUKernel()

    def construct(self, x):
        return self.kernel(x)[0]


class QuickGELU(nn.Cell):
    """x times the logistic function at 1.702 x, as in OpenAI's CLIP (Hendrycks & Gimpel 2016, section 2)."""

    def construct(self, x):
        return x * ops.sigmoid(1.702 * x)


class GatedGELU(nn.Cell):
    """(rows, 2 n) to (rows, n): the first half times the GELU of the second (GEGLU, Shazeer 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = GatedGELUKernel()

    def construct(self, x):
        return self.kernel(x)[0]


class AddPerChannel(nn.Cell):
    """(B, C, H, W) + (B, C): a vector for each sample, added at every place."""

    def construct(self, x, vector):
        return x + vector.reshape(vector.shape + (1, 1))


class SplitHeads(nn.Cell):
    """(B, N, heads * d) to (B, heads, N, d)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def construct(self, x):
        batch, length, channels = x.shape
        return x.reshape(batch, length, self.heads, channels // self.heads).transpose(0, 2, 1, 3)


class MergeHeads(nn.Cell):
    """(B, heads, N, d) to (B, N, heads * d)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def construct(self, x):
        batch, heads, length, channels = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * channels)


class Attention(nn.Cell):
    """Multi-head attention on q (B, N, heads * d), k and v (B, M, heads * d): softmax(q k^T / sqrt(d)) v.

    Vaswani et al. 2017, eq. 1. With `causal`, N and M are `length` and position i sees positions 0 to i only.
    With `upcast`, q and k are multiplied in float32.

    Args:
        fuses: by CANN's fused attention where that takes the heads; it keeps its scores in float32. Never run
            on a device.
    """

    def __init__(
        self, heads: int, causal: bool = False, length: int = 0, upcast: bool = False, fuses: bool = False,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.can_fuse = fuses and not causal
        self.split_heads, self.merge_heads = SplitHeads(heads), MergeHeads(heads)
        self.softmax_attention = SoftmaxAttention(causal, length, CHUNK_BYTES)

    def construct(self, q, k, v):
        head_channels = q.shape[2] // self.heads
        # up to 256: what everybody runs, though the kernel says 512; beyond is the VAE's only layer
        takes = q.dtype != ms.float32 and head_channels % 16 == 0 and head_channels <= 256
        if self.can_fuse and takes:
            return self.fused(q, k, v, head_channels**-0.5)
        if self.upcast:
            q, k = q.astype(ms.float32), k.astype(ms.float32)
        q, k, v = self.split_heads(q * head_channels**-0.5), self.split_heads(k), self.split_heads(v)
        return self.merge_heads(self.softmax_attention(q, k, v))

    def fused(self, q, k, v, scale):
        return ops.flash_attention_score(q, k, v, self.heads, scalar_value=scale, input_layout="BSH")


class CausalAttention(nn.Cell):
    """Attention in which position i sees positions 0 to i only, on queries, keys and values side by side:
    (B, length, 3 C) to (B, length, C).
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.thirds = ops.Split(-1, 3)

    def construct(self, qkv):
        q, k, v = self.thirds(qkv)
        return self.attention(q, k, v)


def weights_of_products(network: nn.Cell) -> list[Parameter]:
    """Weights and biases of the layers that multiply, which cast them to their compute dtype."""
    cells = [cell for _, cell in network.cells_and_names() if isinstance(cell, (Dense, Conv2d))]
    return [parameter for cell in cells for parameter in cell.get_parameters()]


def set_dtype(parameter: Parameter, dtype) -> None:
    """Change the dtype of a parameter, and of its values where it has any."""
    if parameter.dtype == dtype:
        return
    values = None if parameter.has_init else parameter.asnumpy()
    parameter.set_dtype(dtype)
    if values is not None:  # from the host: a copy on the device keeps its old dtype
        parameter.set_data(Tensor(values, dtype))
