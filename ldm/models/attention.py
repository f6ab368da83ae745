"""The UNet's transformer: self-attention, cross-attention to the text, gated feed-forward (Rombach et al. 2022).

Attribute names are the checkpoint's parameter names.
"""

import mindspore as ms
from mindspore import nn

from ldm.models.kernels import GatedGELU
from ldm.models.layers import Attention, Dense, GroupNorm, LayerNorm, PlacesToTokens, TokensToPlaces


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


class BasicTransformerBlock(nn.Cell):
    def __init__(self, channels: int, context_dim: int, heads: int, dropout: float, dtype) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads, dropout, dtype)
        self.ff = FeedForward(channels, dropout, dtype)
        self.attn2 = CrossAttention(channels, context_dim, heads, dropout, dtype)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)

    def construct(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
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
