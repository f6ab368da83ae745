"""The layers of `layers` for an Atlas A2 or A3: the same names, parameters and values, by CANN's newer
kernels (aclnn).

An old one (aclop) costs the host several times as much to start, and a step is thousands of them. None of the
operators below has a kernel for a CPU: tests/cann.py puts in their place what is documented of them.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.auto_generate import (
    ConstantPadND,
    Convolution,
    GeluExt,
    GeluGradExt,
    LayerNormExt,
    SplitTensor,
)
from mindspore.ops.auto_generate import Dense as Linear

from ldm.networks import layers
from ldm.networks.layers import AddPerChannel, GroupNorm, GroupNormSiLU, QuickGELU

__all__ = ["AddPerChannel", "GroupNorm", "GroupNormSiLU", "QuickGELU"]  # as they are


class Dense(layers.Dense):
    """With its bias in one kernel."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True, dtype=ms.float32) -> None:
        super().__init__(in_channels, out_channels, has_bias, dtype)
        self.linear = Linear()
        if has_bias:  # without one, Linear's gradient would transpose
            self.apply = self.apply_linear

    def apply_linear(self, x, weight, bias):
        return self.linear(x.astype(self.dtype), weight.astype(self.dtype), bias.astype(self.dtype))


class PlacesToTokens(layers.PlacesToTokens, Dense):
    """With the product of this Dense."""


class TokensToPlaces(layers.TokensToPlaces, Dense):
    """With the product of this Dense."""


class Conv2d(layers.Conv2d):
    """With its bias in one kernel, and one for all its gradients."""

    def __init__(  # noqa: PLR0913
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding=0,
        has_bias: bool = True, dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel, stride, padding, has_bias, dtype)
        self.convolution, self.pad = Convolution(), ConstantPadND()
        self.strides = (stride, stride)
        self.pads_first = isinstance(padding, tuple)
        self.pads = (0, 0) if self.pads_first else (padding, padding)
        if self.pads_first:
            top, bottom, left, right = padding
            self.sides = (left, right, top, bottom)  # the last axis first

    def construct(self, x):
        x = x.astype(self.dtype)
        if self.pads_first:
            x = self.pad(x, self.sides, 0.0)
        weight = self.weight.astype(self.dtype)
        bias = self.bias.astype(self.dtype) if self.has_bias else None
        return self.convolution(x, weight, bias, self.strides, self.pads, (1, 1), False, (0, 0), 1)


class UpsampledConv2d(Conv2d):
    """Nearest up-sampling of (B, C, H, W) to twice the size, then a 3x3 convolution."""

    def __init__(self, channels: int, dtype=ms.float32) -> None:
        super().__init__(channels, channels, 3, padding=1, dtype=dtype)

    def construct(self, x):
        return super().construct(layers.upsample_nearest(x))


class LayerNorm(layers.LayerNorm):
    """CANN's takes float16 values beside float32 scales and shifts, and computes in float32 (aclnnLayerNorm,
    `implMode` 0).
    """

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__(channels, epsilon)
        self.epsilon, self.shape = epsilon, (channels,)
        self.norm = LayerNormExt()

    def apply(self, x, gamma, beta):
        return self.norm(x, self.shape, gamma, beta, self.epsilon)[0]


class GELU(layers.GELU):
    """In one kernel, as its gradient is."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = GeluExt()

    def construct(self, x):
        return self.gelu(x, "none")


class GatedGELU(layers.GatedGELU):
    """With a gradient of its own: MindSpore's adds up zeros for the other half of each half."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu, self.gradient = GeluExt(), GeluGradExt()
        self.halves, self.join = SplitTensor(), ops.Concat(-1)

    def construct(self, x):
        value, gate = self.halves(x, x.shape[-1] // 2, -1)
        return value * self.gelu(gate, "none")

    def bprop(self, x, out, dout):
        value, gate = self.halves(x, x.shape[-1] // 2, -1)
        dgate = self.gradient(dout * value, gate, "none")
        return (self.join((dout * self.gelu(gate, "none"), dgate)),)


class Attention(layers.Attention):
    """The causal one is fused, too."""

    def __init__(
        self, heads: int, causal: bool = False, length: int = 0, upcast: bool = False, fuses: bool = False,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(heads, causal, length, upcast, fuses, dtype)
        self.can_fuse, self.causal = fuses, causal
        if causal:
            self.hidden = Tensor(np.triu(np.ones((length, length), np.bool_), 1))

    def fused(self, q, k, v, scale):
        mask = self.hidden if self.causal else None
        return ops.flash_attention_score(
            q, k, v, self.heads, attn_mask=mask, scalar_value=scale, input_layout="BSH"
        )


class CausalAttention(layers.CausalAttention):
    """With a gradient of its own, as GatedGELU has."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.split, self.join = SplitTensor(), ops.Concat(-1)
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, qkv):
        q, k, v = self.split(qkv, qkv.shape[-1] // 3, -1)
        return self.attention(q, k, v)

    def bprop(self, qkv, out, dout):
        q, k, v = self.split(qkv, qkv.shape[-1] // 3, -1)
        return (self.join(self.gradient(self.attention)(q, k, v, dout)),)


def add_gradients_by_add() -> None:
    """Where a value is used twice, MindSpore adds its two gradients by AddN, of which CANN has the old kernel
    only; from now on by Add. The sums are the same.
    """
    from mindspore.ops.composite.multitype_ops.add_impl import _add_backward

    @_add_backward.register("Tensor", "Tensor")
    def _add_two(x, y):
        return ops.add(x, y)
