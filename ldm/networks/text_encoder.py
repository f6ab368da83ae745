"""The text encoder: the text tower of OpenCLIP's ViT-H/14 in Stable Diffusion 2, of OpenAI's ViT-L/14 in 1.x
(Radford et al. 2021; Ilharco et al. 2021).

SD2 uses 23 of its 24 layers and applies the final norm to the output of the 23rd. Attribute names are the
checkpoint's.
"""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from ldm.config import TextEncoderConfig
from ldm.networks.layer_set import LayerSet


class MultiheadAttention(nn.Cell):
    """Causal self-attention; query, key and value come from one projection."""

    def __init__(self, config: TextEncoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.in_proj = layers.Dense(config.width, 3 * config.width)
        self.out_proj = layers.Dense(config.width, config.width)
        self.attention = layers.CausalAttention(
            layers.Attention(config.heads, causal=True, length=config.context_length)
        )

    def construct(self, x):
        return self.out_proj(self.attention(self.in_proj(x)))


class AttentionWrapper(nn.Cell):
    """Gives the checkpoint's name `attn.attn`."""

    def __init__(self, config: TextEncoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.attn = MultiheadAttention(config, layers)

    def construct(self, x):
        return self.attn(x)


class ResidualAttentionBlock(nn.Cell):
    def __init__(self, config: TextEncoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.attn = AttentionWrapper(config, layers)
        self.ln_1 = layers.LayerNorm(config.width)
        self.c_fc = layers.Dense(config.width, 4 * config.width)
        self.c_proj = layers.Dense(4 * config.width, config.width)
        self.ln_2 = layers.LayerNorm(config.width)
        self.gelu = layers.QuickGELU() if config.activation == "quick_gelu" else layers.GELU()

    def construct(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(self.gelu(self.c_fc(self.ln_2(x))))


class Transformer(nn.Cell):
    def __init__(self, config: TextEncoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.resblocks = nn.CellList([ResidualAttentionBlock(config, layers) for _ in range(config.layers)])

    def construct(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class TextTransformer(nn.Cell):
    def __init__(self, config: TextEncoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.dtype = layers.dtype
        table = initializer(Normal(0.02), (config.vocab_size, config.width), ms.float32)
        positions = initializer(Normal(0.01), (config.context_length, config.width), ms.float32)
        self.embedding_table = Parameter(table, name="embedding_table")
        self.positional_embedding = Parameter(positions, name="positional_embedding")
        self.transformer_layer = Transformer(config, layers)
        self.ln_final = layers.LayerNorm(config.width)
        self.word = -1

    def take_out_word(self, token: int) -> Parameter:
        """From now on the embedding of a token is a parameter of its own (1, width), which is returned: it
        can be trained, and the table left as it is.
        """
        row = Tensor(self.embedding_table.asnumpy()[token : token + 1])
        name = self.embedding_table.name.replace("embedding_table", "word_embedding")
        self.word, self.word_embedding = token, Parameter(row, name=name)
        return self.word_embedding

    def construct(self, token_ids):
        x = ops.gather(self.embedding_table, token_ids, 0)
        if self.word >= 0:
            is_it = (token_ids == self.word).astype(ms.float32).expand_dims(-1)
            x = x * (1 - is_it) + self.word_embedding * is_it
        x = x + self.positional_embedding
        return self.ln_final(self.transformer_layer(x.astype(self.dtype))).astype(ms.float32)


class TextEncoder(nn.Cell):
    """token_ids (B, 77) int32 to text features (B, 77, width), the `context` of the UNet."""

    def __init__(self, config: TextEncoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.transformer = TextTransformer(config, layers)

    def construct(self, token_ids):
        return self.transformer(token_ids)


class EncodeText(nn.Cell):
    """A text encoder as it is now. MindSpore takes a graph again that it has compiled of a cell, for inputs
    of the same shape, whatever has become of the cell since then (a LoRA, a word of its own): a new cell has
    none.
    """

    def __init__(self, text_encoder: TextEncoder) -> None:
        super().__init__(auto_prefix=False)
        self.text_encoder = text_encoder

    def construct(self, token_ids):
        return self.text_encoder(token_ids)
