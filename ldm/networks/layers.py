"""Layers shared by the three networks. What they compute on a CPU is in `kernels`, with the reasons.

A layer takes the compute dtype when it is made: its weights stay float32 and are cast where they are used. Norms and
softmax compute in float32 and answer in the dtype they were given.
"""

import math

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import HeUniform, initializer

from ldm.networks.convolution import MatmulConv, UpsampledConv, is_small, pad_zeros
from ldm.networks.kernels import (
    AddBias,
    MergeHeads,
    Normalise,
    ScaleAndShift,
    ScaleShiftSiLU,
    SoftmaxAttention,
    SplitHeads,
    upsample_nearest,
)


def _on_cpu() -> bool:
    return ms.get_context("device_target") == "CPU"


def has_flash_attention(device_name: str) -> bool:
    """Whether CANN has MindSpore's fused attention: on the Atlas A2 and A3 training series, not on the first Ascend 910."""
    return device_name.startswith(("Ascend910B", "Ascend910_93"))


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
        self.bias_add = AddBias() if _on_cpu() else ops.BiasAdd()

    def construct(self, x):
        return self.apply(x, self.weight, self.bias if self.has_bias else None)

    def apply(self, x, weight, bias):
        """The layer with a weight and a bias that are given."""
        y = self.matmul(x.astype(self.dtype).reshape(-1, self.in_channels), weight.astype(self.dtype))
        if self.has_bias:
            y = self.bias_add(y, bias.astype(self.dtype))
        return y.reshape(x.shape[:-1] + (self.out_channels,))


class PlacesToTokens(Dense):
    """A Dense layer over the channels of (B, C, H, W), with the answer as tokens (B, H*W, out)."""

    # The product reads its operands transposed; a Transpose would keep 8 bytes per element for good on CPU. A batched product needs a
    # copy of the weight for each sample, so a large weight is multiplied sample by sample.
    def __init__(self, in_channels: int, out_channels: int, dtype=ms.float32) -> None:
        super().__init__(in_channels, out_channels, dtype=dtype)
        self.product = ops.MatMul(transpose_a=True, transpose_b=True)
        self.batched = ops.BatchMatMul(transpose_a=True, transpose_b=True)

    def construct(self, x):
        batch, channels, height, width = x.shape
        x, weight = x.astype(self.dtype), self.weight.astype(self.dtype)
        if is_small(self.weight):
            y = self.batched(x.reshape(batch, channels, height * width), ops.broadcast_to(weight, (batch,) + weight.shape))
            y = y.reshape(-1, self.out_channels)
        else:
            tokens = ()
            for sample in ops.Split(0, batch)(x):
                tokens = tokens + (self.product(sample.reshape(channels, height * width), weight),)
            y = ops.cat(tokens, 0)
        y = self.bias_add(y, self.bias.astype(self.dtype))
        return y.reshape(batch, height * width, self.out_channels)


class TokensToPlaces(Dense):
    """A Dense layer on tokens (B, H*W, in), with the answer as places (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dtype=ms.float32) -> None:
        super().__init__(in_channels, out_channels, dtype=dtype)
        self.batched = ops.BatchMatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, x, height, width):
        batch, length, channels = x.shape
        x, weight = x.astype(self.dtype), self.weight.astype(self.dtype)
        if is_small(self.weight):
            y = self.batched(ops.broadcast_to(weight, (batch,) + weight.shape), x)
        else:
            places = ()
            for sample in ops.Split(0, batch)(x):
                places = places + (self.matmul(weight, sample.reshape(length, channels)),)
            y = ops.cat(places, 0)
        return self.bias_add(y.reshape(batch, self.out_channels, height, width), self.bias.astype(self.dtype))


class Conv2d(nn.Cell):
    """Convolution with bias on (B, C, H, W). `padding` is one number, or (top, bottom, left, right)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding=0, dtype=ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = _weight(out_channels, in_channels, kernel, kernel)
        self.bias = _bias(out_channels)
        self.by_matmul = kernel == 3 and _on_cpu()
        self.pads_first = self.by_matmul and isinstance(padding, tuple)
        if self.by_matmul:
            if self.pads_first:
                self.top, self.bottom, self.left, self.right = padding
            self.conv2d = MatmulConv(out_channels, stride, 0 if self.pads_first else padding)
        else:
            self.conv2d = ops.Conv2D(out_channels, kernel, pad_mode="pad", pad=padding, stride=stride)
        self.bias_add = ops.BiasAdd()

    def construct(self, x):
        x, weight = x.astype(self.dtype), self.weight.astype(self.dtype)
        if self.pads_first:
            x = pad_zeros(pad_zeros(x, 2, self.top, self.bottom), 3, self.left, self.right)
        if self.by_matmul:  # float16 values, float32 sums, as an accelerator has them
            y = self.conv2d(x.astype(ms.float32), weight.astype(ms.float32)).astype(self.dtype)
        else:
            y = self.conv2d(x, weight)
        return self.bias_add(y, self.bias.astype(self.dtype))


class UpsampledConv2d(Conv2d):
    """Nearest up-sampling of (B, C, H, W) to twice the size, then a 3x3 convolution."""

    def __init__(self, channels: int, dtype=ms.float32) -> None:
        super().__init__(channels, channels, 3, padding=1, dtype=dtype)
        if self.by_matmul:
            self.conv2d = UpsampledConv(channels)

    def construct(self, x):
        return super().construct(x if self.by_matmul else upsample_nearest(x))


class GroupNorm(nn.Cell):
    """Group normalisation of (B, C, H, W) with learned scale and shift. Each place in the networks has its own epsilon."""

    def __init__(self, groups: int, channels: int, epsilon: float) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.gamma = Parameter(initializer("ones", (channels,), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,), ms.float32), name="beta")
        self.on_cpu = _on_cpu()
        if self.on_cpu:
            self.normalise, self.scale_and_shift = Normalise(epsilon), ScaleAndShift()

    def construct(self, x):
        y = x.astype(ms.float32)
        if self.on_cpu:
            batch, channels, height, width = x.shape
            y = self.normalise(y.reshape(1, batch * self.groups, channels // self.groups * height, width))[0]
            y = self.scale_and_shift(y.reshape(x.shape), self.gamma, self.beta)
        else:
            y = ops.group_norm(y, self.groups, self.gamma, self.beta, self.epsilon)
        return y.astype(x.dtype)


class GroupNormSiLU(GroupNorm):
    """Group normalisation, then SiLU."""

    def __init__(self, groups: int, channels: int, epsilon: float) -> None:
        super().__init__(groups, channels, epsilon)
        if self.on_cpu:
            self.scale_and_shift = ScaleShiftSiLU()

    def construct(self, x):
        y = super().construct(x)
        return y if self.on_cpu else ops.silu(y)


class LayerNorm(nn.Cell):
    """Normalisation of the last axis with learned scale and shift."""

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=epsilon)
        self.gamma = Parameter(initializer("ones", (channels,), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,), ms.float32), name="beta")
        self.on_cpu = _on_cpu()
        if self.on_cpu:
            self.normalise, self.scale_and_shift = Normalise(epsilon), ScaleAndShift()

    def construct(self, x):
        return self.apply(x, self.gamma, self.beta)

    def apply(self, x, gamma, beta):
        """The layer with a scale and a shift that are given."""
        y = x.astype(ms.float32)
        if self.on_cpu:
            y = self.normalise(y.reshape(1, -1, self.channels, 1))[0]
            y = self.scale_and_shift(y.reshape(-1, self.channels, 1, 1), gamma, beta).reshape(x.shape)
        else:
            y = self.norm(y, gamma, beta)[0]
        return y.astype(x.dtype)


class Attention(nn.Cell):
    """Multi-head attention on q (B, N, heads * d), k and v (B, M, heads * d): softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    With `causal`, N and M are `length` and position i sees positions 0 to i only. Fused where the device can; never run so far.
    """

    def __init__(self, heads: int, causal: bool = False, length: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.can_fuse = not causal and not _on_cpu() and has_flash_attention(ms.hal.get_device_name(0))
        self.split_heads, self.merge_heads = SplitHeads(heads), MergeHeads(heads)
        self.softmax_attention = SoftmaxAttention(causal, length)

    def construct(self, q, k, v):
        head_channels = q.shape[2] // self.heads
        if self.can_fuse and q.dtype == ms.float16 and head_channels % 16 == 0 and head_channels <= 512:  # what the kernel takes
            return ops.flash_attention_score(q, k, v, self.heads, scalar_value=head_channels**-0.5, input_layout="BSH")
        q = q * head_channels**-0.5
        return self.merge_heads(self.softmax_attention(self.split_heads(q), self.split_heads(k), self.split_heads(v)))
