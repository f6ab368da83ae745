"""CANN's newer kernels, as far as this program calls them: by their documentation, with operators of a CPU.

They have no kernel here: what is tested with these is how they are called. Sources: docs/aclnn*.md of CANN's
ops-nn and ops-transformer.
"""

import mindspore as ms
from mindspore import nn, ops

from ldm.networks.kernels import INV_SQRT2, INV_SQRT_2PI

# made here: their functional forms do not compile inside a bprop
TIMES, TIMES_TRANSPOSED = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
SOFTMAX, CAST = ops.Softmax(-1), ops.Cast()


class Linear(nn.Cell):
    """aclnnAddmm: input (..., in) times weight (out, in) transposed, plus bias (out,)."""

    def construct(self, x, weight, bias):
        y = ops.matmul(x.reshape(-1, x.shape[-1]), weight.T) + bias
        return y.reshape(x.shape[:-1] + (weight.shape[0],))


class Convolution(nn.Cell):
    """aclnnConvolution on NCHW, neither transposed, grouped nor dilated here."""

    def construct(self, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):  # noqa: PLR0913
        y = ops.conv2d(x, weight, None, stride, "pad", padding, dilation, groups)
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)


class ConstantPadND(nn.Cell):
    """aclnnConstantPadNd: `sides` are before and after the last axis, before and after the one before it."""

    def construct(self, x, sides, value):
        left, right, top, bottom = sides
        return ops.pad(x, (left, right, top, bottom), "constant", value)


class LayerNormExt(nn.Cell):
    """aclnnLayerNorm: values of any dtype beside float32 scales, computed in float32."""

    def construct(self, x, shape, gamma, beta, epsilon):
        wide = x.astype(ms.float32)
        centred = wide - wide.mean(-1, keep_dims=True)
        rstd = ops.rsqrt(ops.square(centred).mean(-1, keep_dims=True) + epsilon)
        return (centred * rstd * gamma + beta).astype(x.dtype), wide, rstd


class GeluExt(nn.Cell):
    """aclnnGeluV2."""

    def construct(self, x, approximate):
        return x * (ops.erf(x * INV_SQRT2) * 0.5 + 0.5)


class GeluGradExt(nn.Cell):
    """aclnnGeluBackwardV2: (gradient of the output, input)."""

    def __init__(self) -> None:
        super().__init__()
        self.erf, self.exp = ops.Erf(), ops.Exp()

    def construct(self, dy, x, approximate):
        return dy * (self.erf(x * INV_SQRT2) * 0.5 + 0.5 + x * self.exp(x * x * -0.5) * INV_SQRT_2PI)


class SplitTensor(nn.Cell):
    """aclnnSplitTensor: parts of `size` along an axis; here the last one, in two or three parts."""

    def construct(self, x, size, axis):
        if x.shape[-1] == 2 * size:
            return x[..., :size], x[..., size:]
        return x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]


def flash_attention_score(query, key, value, head_num, attn_mask=None, scalar_value=1.0, input_layout="BSH"):
    """aclnnFlashAttentionScore on (B, S, H): softmax in float32; what the mask says True of is not seen."""
    shape = (query.shape[0], -1, head_num, query.shape[2] // head_num)
    q, k, v = (
        query.reshape(shape).transpose(0, 2, 1, 3),
        key.reshape(shape).transpose(0, 2, 1, 3),
        value.reshape(shape).transpose(0, 2, 1, 3),
    )
    scores = TIMES_TRANSPOSED(q, k).astype(ms.float32) * scalar_value
    scores = scores - (0.0 if attn_mask is None else CAST(attn_mask, ms.float32) * 1e30)
    answer = TIMES(SOFTMAX(scores).astype(value.dtype), v)
    return answer.transpose(0, 2, 1, 3).reshape(query.shape)


class AdamW(nn.Cell):
    """aclnnApplyAdamWV2, in place."""

    def construct(self, p, m, v, _, gradient, step, rate, beta1, beta2, decay, epsilon):  # noqa: PLR0913
        m1 = beta1 * m + (1 - beta1) * gradient
        v1 = beta2 * v + (1 - beta2) * gradient * gradient
        corrected = ops.sqrt(v1 / (1 - ops.pow(beta2, step))) + epsilon
        moved = p - rate * decay * p - rate * m1 / (1 - ops.pow(beta1, step)) / corrected
        moments = ops.assign(m, m1), ops.assign(v, v1)
        return (ops.assign(p, ops.depend(moved, moments)),)


OPERATORS = (Linear, Convolution, ConstantPadND, LayerNormExt, GeluExt, GeluGradExt, SplitTensor)


def put_in_place(monkeypatch) -> None:
    """What layers_ascend and optim import of CANN's kernels is from now on what is here."""
    from ldm.networks import layer_set, layers_ascend
    from ldm.training import optim

    for operator in OPERATORS:
        monkeypatch.setattr(layers_ascend, operator.__name__, operator)
    monkeypatch.setattr(ops, "flash_attention_score", flash_attention_score)
    monkeypatch.setattr(optim, "FusedKernel", AdamW)
    monkeypatch.setattr(layer_set, "has_newer_kernels", lambda: True)
    monkeypatch.setattr(layers_ascend, "add_gradients_by_add", lambda: None)
