"""The denoising UNet of Stable Diffusion (Rombach et al. 2022; Dhariwal & Nichol 2021).

Attribute names are the checkpoint's parameter names: `in_layers_norm`, `in_layers_conv.conv` and `op.conv`
are the MindSpore port's spelling of Stability's `in_layers.0`, `in_layers.2` and `op`.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.config import UNetConfig
from ldm.networks.attention import SpatialTransformer
from ldm.networks.kernels import upsample_nearest
from ldm.networks.layer_set import LayerSet


class Conv(nn.Cell):
    """A convolution under the name `conv`. The layers of a block are all called with (h, emb, context, size),
    of which `size` is the one that an up-sampling ends with.
    """

    def __init__(
        self, in_channels: int, out_channels: int, layers: LayerSet, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = layers.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)

    def construct(self, h, emb=None, context=None, size=None):
        return self.conv(h)


class Downsample(nn.Cell):
    def __init__(self, channels: int, layers: LayerSet) -> None:
        super().__init__()
        self.op = Conv(channels, channels, layers, stride=2)

    def construct(self, h, emb, context, size):
        return self.op(h)


class Upsample(nn.Cell):
    def __init__(self, channels: int, layers: LayerSet) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, layers)

    def construct(self, h, emb, context, size):
        h = upsample_nearest(h)
        if h.shape[2] != size[0] or h.shape[3] != size[1]:  # odd before it was down-sampled
            h = h[:, :, : size[0], : size[1]]
        return self.conv(h)


class ResBlock(nn.Cell):
    """Two convolutions around a residual, with the time embedding added between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        groups: int,
        dropout: float,
        layers: LayerSet,
    ) -> None:
        super().__init__()
        self.in_layers_norm = layers.GroupNormSiLU(groups, in_channels, epsilon=1e-5)
        self.in_layers_conv = Conv(in_channels, out_channels, layers)
        self.emb_layers = nn.SequentialCell(nn.SiLU(), layers.Dense(emb_channels, out_channels))
        self.out_layers_norm = layers.GroupNormSiLU(groups, out_channels, epsilon=1e-5)
        self.out_layers_conv = Conv(out_channels, out_channels, layers)
        self.dropout = nn.Dropout(p=dropout)
        self.add_per_channel = layers.AddPerChannel()
        if in_channels == out_channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = Conv(in_channels, out_channels, layers, kernel=1)

    def construct(self, h, emb, context, size):
        x = h
        h = self.in_layers_conv(self.in_layers_norm(h))
        h = self.add_per_channel(h, self.emb_layers(emb))
        h = self.out_layers_conv(self.dropout(self.out_layers_norm(h)))
        return self.skip_connection(x) + h


class UNetModel(nn.Cell):
    """Predicts the noise (or v) in latents, given the step and the text.

    Args:
        config: sizes.
        layers: what it is built of; their compute dtype is float32 or float16, the weights are float32.

    Inputs:
        x_t: (B, 4, H/8, W/8) float32, t: (B,) int32, context: (B, 77, context_dim).

    Returns:
        (B, 4, H/8, W/8) float32.
    """

    def __init__(self, config: UNetConfig, layers: LayerSet) -> None:
        super().__init__()
        self.dtype = layers.dtype
        width = config.model_channels
        emb_channels = 4 * width
        half = width // 2
        self.frequencies = Tensor(np.exp(-math.log(10000) * np.arange(half) / half)[None].astype(np.float32))
        self.time_embed = nn.SequentialCell(
            layers.Dense(width, emb_channels), nn.SiLU(), layers.Dense(emb_channels, emb_channels)
        )

        def res_block(in_channels, out_channels):
            return ResBlock(
                in_channels, out_channels, emb_channels, config.norm_groups, config.dropout, layers
            )

        def transformer(channels):
            return SpatialTransformer(channels, config, layers)

        levels = list(enumerate(width * mult for mult in config.channel_mult))
        input_blocks = [nn.CellList([Conv(config.in_channels, width, layers)])]
        skips, channels = [width], width
        for level, out_channels in levels:
            attends = 2**level in config.attention_resolutions
            for _ in range(config.num_res_blocks):
                block = [res_block(channels, out_channels)] + ([transformer(out_channels)] if attends else [])
                input_blocks.append(nn.CellList(block))
                channels = out_channels
                skips.append(channels)
            if level + 1 < len(levels):
                input_blocks.append(nn.CellList([Downsample(channels, layers)]))
                skips.append(channels)
        self.input_blocks = nn.CellList(input_blocks)

        middle = [res_block(channels, channels), transformer(channels), res_block(channels, channels)]
        self.middle_block = nn.CellList(middle)

        output_blocks = []
        for level, out_channels in reversed(levels):
            attends = 2**level in config.attention_resolutions
            for index in range(config.num_res_blocks + 1):
                block = [res_block(channels + skips.pop(), out_channels)] + (
                    [transformer(out_channels)] if attends else []
                )
                channels = out_channels
                if level and index == config.num_res_blocks:
                    block.append(Upsample(channels, layers))
                output_blocks.append(nn.CellList(block))
        self.output_blocks = nn.CellList(output_blocks)

        self.out = nn.SequentialCell(
            layers.GroupNormSiLU(config.norm_groups, channels, epsilon=1e-5),
            nn.Identity(),
            Conv(channels, config.out_channels, layers),
        )

    def construct(self, x_t, t, context):
        angles = t.astype(ms.float32).reshape(-1, 1) * self.frequencies  # (B, width / 2)
        emb = self.time_embed(ops.cat((ops.cos(angles), ops.sin(angles)), -1))
        h, context = x_t.astype(self.dtype), context.astype(self.dtype)
        skips = ()
        for block in self.input_blocks:
            for layer in block:
                h = layer(h, emb, context, None)
            skips = skips + (h,)
        for layer in self.middle_block:
            h = layer(h, emb, context, None)
        for block in self.output_blocks:
            h = ops.cat((h, skips[-1]), 1)
            skips = skips[:-1]
            size = skips[-1].shape[2:] if len(skips) > 0 else None
            for layer in block:
                h = layer(h, emb, context, size)
        return self.out(h).astype(ms.float32)
