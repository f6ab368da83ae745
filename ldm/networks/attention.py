"""The UNet's transformer: self-attention, cross-attention to the text, gated feed-forward (Rombach et al.
2022).

Attribute names are the checkpoint's parameter names.
"""

from mindspore import nn, ops

from ldm.config import UNetConfig
from ldm.networks.layer_set import LayerSet


class CrossAttention(nn.Cell):
    """Attention from x (B, N, C) to context (B, M, context_dim); to x itself where the context is x."""

    def __init__(self, channels: int, context_dim: int, config: UNetConfig, layers: LayerSet) -> None:
        super().__init__()
        self.to_q = layers.Dense(channels, channels, has_bias=False)
        self.to_k = layers.Dense(context_dim, channels, has_bias=False)
        self.to_v = layers.Dense(context_dim, channels, has_bias=False)
        self.attention = layers.Attention(config.heads(channels), upcast=config.upcast_attention)
        self.to_out = nn.SequentialCell(layers.Dense(channels, channels), nn.Dropout(p=config.dropout))

    def construct(self, x, context):
        return self.to_out(self.attention(self.to_q(x), self.to_k(context), self.to_v(context)))


class GEGLU(nn.Cell):
    """Half of the projection, gated by the GELU of the other half (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int, layers: LayerSet) -> None:
        super().__init__()
        self.proj = layers.Dense(channels, 2 * inner)
        self.gated_gelu = layers.GatedGELU()

    def construct(self, x):
        return self.gated_gelu(self.proj(x))


class FeedForward(nn.Cell):
    def __init__(self, channels: int, dropout: float, layers: LayerSet) -> None:
        super().__init__()
        inner = 4 * channels
        self.net = nn.SequentialCell(
            GEGLU(channels, inner, layers), nn.Dropout(p=dropout), layers.Dense(inner, channels)
        )

    def construct(self, x):
        return self.net(x)

    def weights(self):
        """Those of the projection, then of the output."""
        return self.net[0].proj.weights(), self.net[2].weights()


class RecomputedFeedForward(nn.Cell):
    """A LayerNorm and a FeedForward of which only the input is kept for the backward pass, which computes
    them a second time.

    What they keep otherwise is half of what a transformer block keeps, and little work beside attention and
    convolutions: selective recomputation (Korthikanti et al. 2022). MindSpore does not let a cell with a
    gradient of its own use
    parameters, so they come in as inputs.
    """

    def __init__(self, norm: nn.Cell, feed_forward: FeedForward) -> None:
        super().__init__(auto_prefix=False)
        self.function = NormAndFeedForward(norm, feed_forward)
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x, weights):
        return self.function(x, weights)

    def bprop(self, x, weights, out, dout):
        # else MindSpore finds it all computed already in the forward pass, and keeps that
        x = ops.depend(x, dout)
        return self.gradient(self.function)(x, weights, dout)


class NormAndFeedForward(nn.Cell):
    """A LayerNorm and a FeedForward with parameters that are given: those of the norm, of the projection, of
    the output.
    """

    def __init__(self, norm: nn.Cell, feed_forward: FeedForward) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.proj = norm.apply, feed_forward.net[0].proj.apply
        self.gated_gelu, self.dropout = feed_forward.net[0].gated_gelu, feed_forward.net[1]
        self.out = feed_forward.net[2].apply

    def construct(self, x, weights):
        of_norm, of_proj, of_out = weights
        h = self.gated_gelu(self.proj(self.norm(x, *of_norm), *of_proj))
        return self.out(self.dropout(h), *of_out)


class BasicTransformerBlock(nn.Cell):
    """Self-attention, cross-attention and feed-forward, each with its norm and around a residual."""

    def __init__(self, channels: int, config: UNetConfig, layers: LayerSet) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, config, layers)
        self.ff = FeedForward(channels, config.dropout, layers)
        self.attn2 = CrossAttention(channels, config.context_dim, config, layers)
        self.norm1 = layers.LayerNorm(channels)
        self.norm2 = layers.LayerNorm(channels)
        self.norm3 = layers.LayerNorm(channels)
        self.recomputes = False

    def recompute_feed_forward(self) -> None:
        """Train in less memory from now on.

        A dropout must be 0: it would drop other values the second time.
        """
        self.recomputes = True
        self.recomputed = RecomputedFeedForward(self.norm3, self.ff)

    def construct(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        if self.recomputes:
            return x + self.recomputed(x, (self.norm3.weights(), *self.ff.weights()))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Cell):
    """A transformer block over the pixels of a (B, C, H, W) map, with projections around it: linear ones in
    SD2, 1x1 convolutions in SD1, which compute the same.
    """

    def __init__(self, channels: int, config: UNetConfig, layers: LayerSet) -> None:
        super().__init__()
        self.norm = layers.GroupNorm(config.norm_groups, channels, epsilon=1e-6)
        self.proj_in = layers.PlacesToTokens(channels, channels, config.use_linear_projection)
        self.transformer_blocks = nn.CellList([BasicTransformerBlock(channels, config, layers)])
        self.proj_out = layers.TokensToPlaces(channels, channels, config.use_linear_projection)

    def construct(self, x, emb, context, size):
        h = self.proj_in(self.norm(x))  # (B, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h, x.shape[2], x.shape[3])
