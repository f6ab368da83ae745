"""The three networks under their checkpoint names."""

import mindspore as ms
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from ldm.config import ModelConfig
from ldm.networks.autoencoder import AutoencoderKL
from ldm.networks.text_encoder import TextEncoder
from ldm.networks.unet import UNetModel


class DiffusionWrapper(nn.Cell):
    """Gives the checkpoint's name `model.diffusion_model`."""

    def __init__(self, config: ModelConfig, dtype) -> None:
        super().__init__()
        self.diffusion_model = UNetModel(config.unet, dtype)


class LatentDiffusion(nn.Cell):
    """UNet, VAE and text encoder. Whoever holds this cell, or one of its networks, must not prefix names anew."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(auto_prefix=True)
        dtype = ms.float16 if config.use_fp16 else ms.float32
        self.model = DiffusionWrapper(config, dtype)
        self.first_stage_model = AutoencoderKL(config.autoencoder, dtype)
        self.cond_stage_model = TextEncoder(config.text_encoder, dtype)
        for name, parameter in self.parameters_and_names():
            parameter.name = name

    @property
    def unet(self) -> UNetModel:
        return self.model.diffusion_model


def build_model(config: ModelConfig, initialise: bool = False) -> LatentDiffusion:
    """The networks in inference mode: without values, for a checkpoint to fill, or with random ones (`initialise`)."""
    if initialise:
        model = LatentDiffusion(config)
    else:
        with no_init_parameters():
            model = LatentDiffusion(config)
    return model.set_train(False)
