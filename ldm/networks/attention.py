"""The UNet's transformer: self-attention, cross-attention to the text, gated feed-forward (Rombach et al. 2022).

Attribute names are the checkpoint's parameter names.
"""

import mindspore as ms
from mindspore import nn, ops

from ldm.networks.kernels import GatedGELU
from ldm.networks.layers import Attention, Dense, GroupNorm, LayerNorm, PlacesToTokens, TokensToPlaces


class CrossAttention(nn.Cell):
    """Attention from x (B, N, C) to context (B, M, context_dim); to x itself where the context is x."""

    def __init__(self, channels: int, context_dim: int, heads: int, dropout: float, dtype) -> None:
        super().__init__()
        self.to_q = Dense(channels, channels, has_bias=False, dtype=dtype)
        self.to_k = Dense(context_dim, channels, has_bias=False, dtype=dtype)
        self.to_v = Dense(context_dim, channels, has_bias=False, dtype=dtype)
        self.attention = Attention(heads)
        self.to_out = nn.SequentialCell(Dense(channels, channels, dtype=dtype), nn.Dropout(p=dropout))

    def construct(self, x, context):
        return self.to_out(self.attention(self.to_q(x), self.to_k(context), self.to_v(context)))


class GEGLU(nn.Cell):
    """Half of the projection, gated by the GELU of the other half (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int, dtype) -> None:
        super().__init__()
        self.proj = Dense(channels, 2 * inner, dtype=dtype)
        self.gated_gelu = GatedGELU()

    def construct(self, x):
        return self.gated_gelu(self.proj(x))[0]


class FeedForward(nn.Cell):
    def __init__(self, channels: int, dropout: float, dtype) -> None:
        super().__init__()
        inner = 4 * channels
        self.net = nn.SequentialCell(GEGLU(channels, inner, dtype), nn.Dropout(p=dropout), Dense(inner, channels, dtype=dtype))

    def construct(self, x):
        return self.net(x)


class RecomputedFeedForward(nn.Cell):
    """A LayerNorm and a FeedForward of which only the input is kept for the backward pass, which computes them a second time.

    What they keep otherwise is half of what a transformer block keeps, and little work beside attention and convolutions:
    selective recomputation (Korthikanti et al. 2022). MindSpore does not let a cell with a gradient of its own use
    parameters, so they come in as inputs.
    """

    def __init__(self, norm: LayerNorm, feed_forward: FeedForward) -> None:
        super().__init__(auto_prefix=False)
        self.function = NormAndFeedForward(norm, feed_forward)
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x, gamma, beta, proj_weight, proj_bias, weight, bias):
        return self.function(x, gamma, beta, proj_weight, proj_bias, weight, bias)

    def bprop(self, x, gamma, beta, proj_weight, proj_bias, weight, bias, out, dout):
        x = ops.depend(x, dout)  # else MindSpore finds it all computed already in the forward pass, and keeps that
        return self.gradient(self.function)(x, gamma, beta, proj_weight, proj_bias, weight, bias, dout)


class NormAndFeedForward(nn.Cell):
    """A LayerNorm and a FeedForward with parameters that are given."""

    def __init__(self, norm: LayerNorm, feed_forward: FeedForward) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.proj = norm.apply, feed_forward.net[0].proj.apply
        self.gated_gelu, self.dropout, self.out = feed_forward.net[0].gated_gelu, feed_forward.net[1], feed_forward.net[2].apply

    def construct(self, x, gamma, beta, proj_weight, proj_bias, weight, bias):
        h = self.gated_gelu(self.proj(self.norm(x, gamma, beta), proj_weight, proj_bias))[0]
        return self.out(self.dropout(h), weight, bias)


class BasicTransformerBlock(nn.Cell):
    """Self-attention, cross-attention and feed-forward, each with its norm and around a residual."""

    def __init__(self, channels: int, context_dim: int, heads: int, dropout: float, dtype) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads, dropout, dtype)
        self.ff = FeedForward(channels, dropout, dtype)
        self.attn2 = CrossAttention(channels, context_dim, heads, dropout, dtype)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)
        self.recomputes = False

    def recompute_feed_forward(self) -> None:
        """Train in less memory from now on. A dropout must be 0: it would draw anew."""
        self.recomputes = True
        self.recomputed = RecomputedFeedForward(self.norm3, self.ff)

    def construct(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        if self.recomputes:
            proj, out = self.ff.net[0].proj, self.ff.net[2]
            return x + self.recomputed(x, self.norm3.gamma, self.norm3.beta, proj.weight, proj.bias, out.weight, out.bias)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Cell):
    """A transformer block over the pixels of a (B, C, H, W) map, with linear projections around it, as SD2 has them."""

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int, dropout: float, dtype=ms.float32) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, epsilon=1e-6)
        self.proj_in = PlacesToTokens(channels, channels, dtype=dtype)
        self.transformer_blocks = nn.CellList([BasicTransformerBlock(channels, context_dim, heads, dropout, dtype)])
        self.proj_out = TokensToPlaces(channels, channels, dtype=dtype)

    def construct(self, x, emb, context):
        h = self.proj_in(self.norm(x))  # (B, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h, x.shape[2], x.shape[3])
