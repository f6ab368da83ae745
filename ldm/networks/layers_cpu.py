"""The layers of `layers` for MindSpore's CPU back end: the same names, parameters and values, by other
kernels.

The reasons and measurements are in `kernels` and `convolution`.
"""

import mindspore as ms
from mindspore import ops

from ldm.networks import kernels, layers
from ldm.networks.convolution import MatmulConv, UpsampledConv, is_small, pad_zeros
from ldm.networks.kernels import AddPerChannel
from ldm.networks.layers import GELU, CausalAttention, GatedGELU, QuickGELU
from ldm.networks.softmax_attention import SoftmaxAttention

__all__ = ["GELU", "AddPerChannel", "CausalAttention", "GatedGELU", "QuickGELU"]  # as they are


class Dense(layers.Dense):
    """The gradient of its bias is a matrix product."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True, dtype=ms.float32) -> None:
        super().__init__(in_channels, out_channels, has_bias, dtype)
        self.bias_add = kernels.AddBias()


class PlacesToTokens(layers.PlacesToTokens):
    """The product reads its operands transposed; a Transpose would never free 8 bytes per element."""

    # A batched product needs a copy of the weight for each sample, so a large weight is multiplied sample by
    # sample.
    def __init__(
        self, in_channels: int, out_channels: int, is_linear: bool = True, has_bias: bool = True,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, is_linear, has_bias, dtype)
        self.bias_add = kernels.AddBias()
        self.product = ops.MatMul(transpose_a=True, transpose_b=True)
        self.batched = ops.BatchMatMul(transpose_a=True, transpose_b=True)

    def construct(self, x):
        batch, channels, height, width = x.shape
        x, weight = x.astype(self.dtype), self.matrix().astype(self.dtype)
        if is_small(self.weight):
            weights = ops.broadcast_to(weight, (batch,) + weight.shape)
            y = self.batched(x.reshape(batch, channels, height * width), weights).reshape(
                -1, self.out_channels
            )
        else:
            tokens = ()
            for sample in ops.Split(0, batch)(x):
                tokens = tokens + (self.product(sample.reshape(channels, height * width), weight),)
            y = ops.cat(tokens, 0)
        y = self.biased(y, self.bias if self.has_bias else None)
        return y.reshape(batch, height * width, self.out_channels)


class TokensToPlaces(layers.TokensToPlaces):
    """The product writes its answer transposed."""

    def __init__(
        self, in_channels: int, out_channels: int, is_linear: bool = True, has_bias: bool = True,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, is_linear, has_bias, dtype)
        self.batched = ops.BatchMatMul(transpose_b=True)

    def construct(self, x, height, width):
        batch, length, channels = x.shape
        x, weight = x.astype(self.dtype), self.matrix().astype(self.dtype)
        if is_small(self.weight):
            y = self.batched(ops.broadcast_to(weight, (batch,) + weight.shape), x)
        else:
            places = ()
            for sample in ops.Split(0, batch)(x):
                places = places + (self.matmul(weight, sample.reshape(length, channels)),)
            y = ops.cat(places, 0)
        y = y.reshape(batch, self.out_channels, height, width)
        return self.biased(y, self.bias if self.has_bias else None)


class Conv2d(layers.Conv2d):
    """3x3 by matrix products, with float16 values and float32 sums, as an accelerator has them."""

    def __init__(  # noqa: PLR0913
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding=0,
        has_bias: bool = True, dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel, stride, padding, has_bias, dtype)
        self.by_matmul = kernel == 3
        self.pads_first = self.by_matmul and isinstance(padding, tuple)
        if self.pads_first:
            self.top, self.bottom, self.left, self.right = padding
        if self.by_matmul:
            self.conv2d = MatmulConv(out_channels, stride, 0 if self.pads_first else padding)

    def construct(self, x):
        x, weight = x.astype(self.dtype), self.weight.astype(self.dtype)
        if self.pads_first:
            x = pad_zeros(pad_zeros(x, 2, self.top, self.bottom), 3, self.left, self.right)
        if self.by_matmul:
            y = self.conv2d(x.astype(ms.float32), weight.astype(ms.float32)).astype(self.dtype)
        else:
            y = self.conv2d(x, weight)
        return self.biased(y)


class UpsampledConv2d(Conv2d):
    """Of sums of the weights, on the small map."""

    def __init__(self, channels: int, dtype=ms.float32) -> None:
        super().__init__(channels, channels, 3, padding=1, dtype=dtype)
        self.conv2d = UpsampledConv(channels)


class GroupNorm(layers.GroupNorm):
    """By BatchNorm's kernels."""

    def __init__(self, groups: int, channels: int, epsilon: float) -> None:
        super().__init__(groups, channels, epsilon)
        self.normalise, self.scale_and_shift = kernels.Normalise(epsilon), kernels.ScaleAndShift()

    def construct(self, x):
        batch, channels, height, width = x.shape
        y = x.astype(ms.float32).reshape(1, batch * self.groups, channels // self.groups * height, width)
        return self.scale_and_shift(self.normalise(y)[0].reshape(x.shape), self.gamma, self.beta).astype(
            x.dtype
        )


class GroupNormSiLU(GroupNorm):
    """SiLU is a part of the scaling, which keeps one map for the backward pass instead of four."""

    def __init__(self, groups: int, channels: int, epsilon: float) -> None:
        super().__init__(groups, channels, epsilon)
        self.scale_and_shift = kernels.ScaleShiftSiLU()


class LayerNorm(layers.LayerNorm):
    """By BatchNorm's kernels."""

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__(channels, epsilon)
        self.normalise, self.scale_and_shift = kernels.Normalise(epsilon), kernels.ScaleAndShift()

    def apply(self, x, gamma, beta):
        y = self.normalise(x.astype(ms.float32).reshape(1, -1, self.channels, 1))[0]
        return (
            self.scale_and_shift(y.reshape(-1, self.channels, 1, 1), gamma, beta)
            .reshape(x.shape)
            .astype(x.dtype)
        )


class Attention(layers.Attention):
    """Heads are split and merged by copies instead of transpositions."""

    def __init__(
        self, heads: int, causal: bool = False, length: int = 0, upcast: bool = False, fuses: bool = False,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(heads, causal, length, upcast, fuses, dtype)
        self.split_heads, self.merge_heads = kernels.SplitHeads(heads), kernels.MergeHeads(heads)
        self.softmax_attention = SoftmaxAttention(causal, length)
