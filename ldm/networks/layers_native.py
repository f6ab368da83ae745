"""The layers of `layers` for a CPU with a C++ compiler: the same names, parameters and values, an operator
each.

Of some 20 operators of MindSpore's that make a layer and its gradient, three are left. They read an image's
neighbourhoods without writing them down, keep nothing for the backward pass but their inputs, and compile in
a fraction of the time. `native/operators.cc` has them. All is float32 but what the dtype says of products:
bfloat16, their factors, where that is faster; float16, their answers and an attention's scores, which are
infinite beyond it.
"""

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.networks import layers
from ldm.networks.kernels import AddPerChannel, upsample_nearest
from ldm.networks.layers import CausalAttention, QuickGELU
from ldm.operators import operator

__all__ = ["AddPerChannel", "CausalAttention", "QuickGELU"]  # as they are

# as operators.cc numbers what a product rounds
ROUNDING = {ms.float32: 0, ms.bfloat16: 1, ms.float16: 2}


def options(*values: float) -> Tensor:
    """What an operator is told beside its inputs."""
    return Tensor(np.array(values, np.float32))


def same(shape, *_):
    return shape


def dense_shape(x, w, *_):
    """Tokens (..., C) to (..., N)."""
    return [*x[:-1], w[0]]


def places_to_tokens_shape(x, w, *_):
    return [x[0], x[2], w[0]]


def tokens_to_places_shape(x, w, *_):
    return [x[0], w[0], x[1]]


def pointwise_shape(x, w, *_):
    return [x[0], w[0], *x[2:]]


class DenseProduct(nn.Cell):
    """x w^T + bias: a dense layer with weights that are given.

    x and the answer are tokens (..., C), or places: (B, C, ...) where both are, else (B, C, P) and on the
    other side tokens (B, P, C).
    """

    SHAPES = {
        (False, False): dense_shape, (True, False): places_to_tokens_shape,
        (False, True): tokens_to_places_shape, (True, True): pointwise_shape,
    }  # fmt: skip

    def __init__(self, takes_places: bool, gives_places: bool, rounding: int) -> None:
        super().__init__()
        forward, backward = self.SHAPES[takes_places, gives_places], self.SHAPES[gives_places, takes_places]
        self.options, kind = options(takes_places, gives_places, rounding), (takes_places, gives_places)
        self.forward = operator("Dense", forward, kind=kind)
        self.of_input = operator("DenseInput", lambda dy, w, _: backward(dy, [w[1]]), kind=kind)
        self.of_weight = operator("DenseWeight", lambda dy, x, w, _: w)
        self.of_weights = operator("DenseWeight", lambda dy, x, w, _: (w, [w[0]]), 2)


class Product(DenseProduct):
    def construct(self, x, weight):
        return self.forward(x, weight, self.options)

    def bprop(self, x, weight, out, dout):
        dw = self.of_weight(dout, x, weight, self.options)
        return self.of_input(dout, weight, self.options), dw


class ProductAndBias(DenseProduct):
    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x, weight, bias, out, dout):
        dw, db = self.of_weights(dout, x, weight, self.options)
        return self.of_input(dout, weight, self.options), dw, db


@functools.cache  # one for all layers: MindSpore reads the code of each cell
def product(takes_places: bool, gives_places: bool, dtype, has_bias: bool) -> nn.Cell:
    kind = ProductAndBias if has_bias else Product
    return kind(takes_places, gives_places, ROUNDING[dtype])


class Dense(layers.Dense):
    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True, dtype=ms.float32) -> None:
        super().__init__(in_channels, out_channels, has_bias)
        self.product = product(False, False, dtype, has_bias)

    def construct(self, x):
        return self.apply(x, *self.weights())

    def apply(self, x, *weights):
        # without a branch: MindSpore loses those of a function that two gradients call
        return self.product(x, *weights)


class PlacesToTokens(layers.PlacesToTokens):
    def __init__(
        self, in_channels: int, out_channels: int, is_linear: bool = True, has_bias: bool = True,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, is_linear, has_bias)
        self.product = product(True, False, dtype, has_bias)

    def construct(self, x):
        return self.product(x.reshape(x.shape[0], self.in_channels, -1), *self.weights())


class TokensToPlaces(layers.TokensToPlaces):
    def __init__(
        self, in_channels: int, out_channels: int, is_linear: bool = True, has_bias: bool = True,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, is_linear, has_bias)
        self.product = product(False, True, dtype, has_bias)

    def construct(self, x, height, width):
        y = self.product(x, *self.weights())
        return y.reshape(x.shape[0], self.out_channels, height, width)


class ConvolutionBase(nn.Cell):
    """(B, C, H, W) by a weight (N, C, K, K) that is given; padding is (top, bottom, left, right)."""

    def __init__(self, stride: int, padding: tuple[int, int, int, int], rounding: int) -> None:
        super().__init__()
        top, bottom, left, right = padding

        def forward(x, w, *_):
            height, width = (
                (size + pads - w[2]) // stride + 1 for size, pads in zip(x[2:], (top + bottom, left + right))
            )
            return [x[0], w[0], height, width]

        def of_input(dy, w, *rest):
            if stride > 1:
                return rest[0]
            return [dy[0], w[1], dy[2] + w[2] - 1 - top - bottom, dy[3] + w[3] - 1 - left - right]

        self.is_strided = stride > 1
        self.options = options(stride, top, left, rounding)
        self.forward = operator("Convolution", forward, kind=(stride, padding))
        self.of_input = operator("ConvolutionInput", of_input, kind=(stride, padding))
        self.of_weight = operator("ConvolutionWeight", lambda dy, x, w, _: w)
        self.of_weights = operator("ConvolutionWeight", lambda dy, x, w, _: (w, [w[0]]), 2)

    def input_gradient(self, x, weight, dout):
        if self.is_strided:
            return self.of_input(dout, weight, x, self.options)
        return self.of_input(dout, weight, self.options)


class Convolution(ConvolutionBase):
    def construct(self, x, weight):
        return self.forward(x, weight, self.options)

    def bprop(self, x, weight, out, dout):
        return self.input_gradient(x, weight, dout), self.of_weight(dout, x, weight, self.options)


class ConvolutionAndBias(ConvolutionBase):
    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.options)

    def bprop(self, x, weight, bias, out, dout):
        dw, db = self.of_weights(dout, x, weight, self.options)
        return self.input_gradient(x, weight, dout), dw, db


@functools.cache
def convolution(stride: int, padding: tuple[int, int, int, int], dtype, has_bias: bool) -> nn.Cell:
    kind = ConvolutionAndBias if has_bias else Convolution
    return kind(stride, padding, ROUNDING[dtype])


class Conv2d(layers.Conv2d):
    def __init__(  # noqa: PLR0913
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding=0,
        has_bias: bool = True, dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel, stride, padding, has_bias)
        if kernel == 1:
            self.convolution = product(True, True, dtype, has_bias)
        else:
            sides = padding if isinstance(padding, tuple) else (padding,) * 4
            self.convolution = convolution(stride, sides, dtype, has_bias)

    def construct(self, x):
        if self.has_bias:
            return self.convolution(x, self.weight, self.bias)
        return self.convolution(x, self.weight)


class UpsampledConvolution(ConvolutionBase):
    """Of x made twice as large; forward by sums of the weights on the small map, 4/9 of the products."""

    def __init__(self, rounding: int) -> None:
        super().__init__(1, (1, 1, 1, 1), rounding)
        self.upsampled = operator("UpsampledConvolution", lambda x, w, *_: [x[0], w[0], 2 * x[2], 2 * x[3]])
        self.sum_of_four = ops.ReduceSum()

    def construct(self, x, weight, bias):
        return self.upsampled(x, weight, bias, self.options)

    def bprop(self, x, weight, bias, out, dout):
        batch, channels, height, width = x.shape
        dw, db = self.of_weights(dout, upsample_nearest(x), weight, self.options)
        dx = self.of_input(dout, weight, self.options).reshape(batch, channels, height, 2, width, 2)
        return self.sum_of_four(dx, (3, 5)), dw, db


class UpsampledConv2d(layers.UpsampledConv2d):
    def __init__(self, channels: int, dtype=ms.float32) -> None:
        super().__init__(channels)
        self.convolution = UpsampledConvolution(ROUNDING[dtype])

    def construct(self, x):
        return self.convolution(x, self.weight, self.bias)


class Norm(nn.Cell):
    """A norm with scale and shift that are given."""

    def __init__(self, name: str, *values: float) -> None:
        super().__init__()
        self.options = options(*values)
        self.forward = operator(name, same)
        self.backward = operator(f"{name}Gradient", lambda dy, x, gamma, beta, _: (x, gamma, beta), 3)

    def construct(self, x, gamma, beta):
        return self.forward(x, gamma, beta, self.options)

    def bprop(self, x, gamma, beta, out, dout):
        return self.backward(dout, x, gamma, beta, self.options)


@functools.cache
def norm(name: str, *values: float) -> nn.Cell:
    return Norm(name, *values)


class GroupNorm(layers.GroupNorm):
    HAS_SILU = False

    def __init__(self, groups: int, channels: int, epsilon: float) -> None:
        super().__init__(groups, channels, epsilon)
        self.norm = norm("GroupNorm", groups, self.HAS_SILU, epsilon)

    def construct(self, x):
        return self.norm(x, self.gamma, self.beta)


class GroupNormSiLU(GroupNorm):
    HAS_SILU = True


class LayerNorm(layers.LayerNorm):
    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__(channels, epsilon)
        self.norm = norm("LayerNorm", epsilon)

    def apply(self, x, gamma, beta):
        return self.norm(x, gamma, beta)


class Activation(nn.Cell):
    """A function of x and its gradient."""

    def __init__(self, name: str, shape) -> None:
        super().__init__()
        self.forward = operator(name, shape)
        self.backward = operator(f"{name}Gradient", lambda dy, x: x)

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.backward(dout, x),)


@functools.cache
def GELU() -> nn.Cell:
    return Activation("Gelu", same)


@functools.cache
def GatedGELU() -> nn.Cell:
    return Activation("GatedGelu", lambda x: [*x[:-1], x[-1] // 2])


class Attention(nn.Cell):
    """Needs no fused kernel, no mask, and no upcast."""

    def __init__(
        self, heads: int, causal: bool = False, length: int = 0, upcast: bool = False, fuses: bool = False,
        dtype=ms.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = options(heads, causal, 0 if upcast else ROUNDING[dtype])
        self.forward = operator("Attention", same)
        self.backward = operator("AttentionGradient", lambda q, k, v, dout, _: (q, k, v), 3)

    def construct(self, q, k, v):
        return self.forward(q, k, v, self.options)

    def bprop(self, q, k, v, out, dout):
        return self.backward(q, k, v, dout, self.options)
