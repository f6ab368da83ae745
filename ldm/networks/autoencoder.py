"""The VAE: images to latents and back (Rombach et al. 2022, section 3.1).

Attribute names are the checkpoint's.
"""

import mindspore as ms
import numpy as np
from mindspore import nn

from ldm.config import AutoencoderConfig
from ldm.networks.layer_set import LayerSet

EPSILON = 1e-6  # of every norm in the VAE


class ResnetBlock(nn.Cell):
    def __init__(self, in_channels: int, out_channels: int, groups: int, layers: LayerSet) -> None:
        super().__init__()
        self.norm1 = layers.GroupNormSiLU(groups, in_channels, EPSILON)
        self.conv1 = layers.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = layers.GroupNormSiLU(groups, out_channels, EPSILON)
        self.conv2 = layers.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels == out_channels:
            self.nin_shortcut = nn.Identity()
        else:
            self.nin_shortcut = layers.Conv2d(in_channels, out_channels, 1)

    def construct(self, x):
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Cell):
    """Attention of a single head over all places of the map."""

    def __init__(self, channels: int, groups: int, layers: LayerSet) -> None:
        super().__init__()
        self.norm = layers.GroupNorm(groups, channels, EPSILON)
        self.q = layers.Conv2d(channels, channels, 1)
        self.k = layers.Conv2d(channels, channels, 1)
        self.v = layers.Conv2d(channels, channels, 1)
        self.proj_out = layers.Conv2d(channels, channels, 1)
        self.attention = layers.Attention(heads=1)

    def construct(self, x):
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        flat = (batch, channels, height * width)
        h = self.attention(
            q.reshape(flat).transpose(0, 2, 1),
            k.reshape(flat).transpose(0, 2, 1),
            v.reshape(flat).transpose(0, 2, 1),
        )
        return x + self.proj_out(h.transpose(0, 2, 1).reshape(x.shape))


class Downsample(nn.Cell):
    """Stride 2, padded at the bottom and the right only, as the checkpoint was trained."""

    def __init__(self, channels: int, layers: LayerSet) -> None:
        super().__init__()
        self.conv = layers.Conv2d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x):
        return self.conv(x)


class Upsample(nn.Cell):
    def __init__(self, channels: int, layers: LayerSet) -> None:
        super().__init__()
        self.conv = layers.UpsampledConv2d(channels)

    def construct(self, x):
        return self.conv(x)


class Level(nn.Cell):
    """The blocks of one resolution, then its `downsample` or `upsample`, where it has one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        groups: int,
        layers: LayerSet,
        resample: str = "",
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.CellList([ResnetBlock(a, b, groups, layers) for a, b in zip(widths, widths[1:])])
        self.has_downsample, self.has_upsample = resample == "down", resample == "up"
        if self.has_downsample:
            self.downsample = Downsample(out_channels, layers)
        if self.has_upsample:
            self.upsample = Upsample(out_channels, layers)

    def construct(self, x):
        for block in self.block:
            x = block(x)
        if self.has_downsample:
            x = self.downsample(x)
        if self.has_upsample:
            x = self.upsample(x)
        return x


class Middle(nn.Cell):
    def __init__(self, channels: int, groups: int, layers: LayerSet) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups, layers)
        self.attn_1 = AttnBlock(channels, groups, layers)
        self.block_2 = ResnetBlock(channels, channels, groups, layers)

    def construct(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Cell):
    def __init__(self, config: AutoencoderConfig, layers: LayerSet) -> None:
        super().__init__()
        widths = [config.base_channels * mult for mult in config.channel_mult]
        self.conv_in = layers.Conv2d(config.image_channels, config.base_channels, 3, padding=1)
        last = len(widths) - 1
        self.down = nn.CellList([
            Level(before, width, config.num_res_blocks, config.norm_groups, layers,
            "down" if level < last else "")
            for level, (before, width) in enumerate(zip([config.base_channels, *widths], widths))
        ])  # fmt: skip
        self.mid = Middle(widths[-1], config.norm_groups, layers)
        self.norm_out = layers.GroupNormSiLU(config.norm_groups, widths[-1], EPSILON)
        self.conv_out = layers.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def construct(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Cell):
    def __init__(self, config: AutoencoderConfig, layers: LayerSet) -> None:
        super().__init__()
        widths = [config.base_channels * mult for mult in config.channel_mult]
        self.conv_in = layers.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups, layers)
        self.levels = len(widths)
        self.up = nn.CellList([
            Level(before, width, config.num_res_blocks + 1, config.norm_groups, layers, "up" if level else "")
            for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths))
        ])  # fmt: skip
        self.norm_out = layers.GroupNormSiLU(config.norm_groups, widths[0], EPSILON)
        self.conv_out = layers.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def construct(self, z):
        h = self.mid(self.conv_in(z))
        for level in range(self.levels - 1, -1, -1):
            h = self.up[level](h)
        return self.conv_out(self.norm_out(h))


class AutoencoderKL(nn.Cell):
    """The VAE. `encode` and `decode` are compiled through the cells Encode and Decode below.

    encode: pixels (B, 3, H, W) in [-1, 1] to moments (B, 8, H/8, W/8): mean and log variance, unscaled,
    float32.
    decode: latents (B, 4, H/8, W/8), unscaled, to pixels (B, 3, H, W), about [-1, 1], float32.
    """

    def __init__(self, config: AutoencoderConfig, layers: LayerSet) -> None:
        super().__init__()
        self.encoder = Encoder(config, layers)
        self.decoder = Decoder(config, layers)
        self.quant_conv = layers.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = layers.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels):
        return self.quant_conv(self.encoder(pixels)).astype(ms.float32)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z)).astype(ms.float32)


class Encode(nn.Cell):
    """The VAE's encoder as a cell of its own: pixels to moments."""

    def __init__(self, autoencoder) -> None:
        super().__init__(auto_prefix=False)
        self.autoencoder = autoencoder

    def construct(self, pixels):
        return self.autoencoder.encode(pixels)


class Decode(nn.Cell):
    """The VAE's decoder as a cell of its own: unscaled latents to pixels."""

    def __init__(self, autoencoder) -> None:
        super().__init__(auto_prefix=False)
        self.autoencoder = autoencoder

    def construct(self, z):
        return self.autoencoder.decode(z)


def posterior_sample(moments: np.ndarray, noise: np.ndarray, scale_factor: float) -> np.ndarray:
    """Scaled latents (B, 4, h, w) sampled from the VAE's posterior by standard normal noise of that shape."""
    mean, log_variance = np.split(moments, 2, axis=1)
    std = np.exp(0.5 * log_variance.clip(-30, 20))  # the bounds of Stable Diffusion's own VAE
    return ((mean + std * noise) * scale_factor).astype(np.float32)
