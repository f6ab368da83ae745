"""The three networks under their checkpoint names."""

from dataclasses import replace

import mindspore as ms
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from ldm.config import ModelConfig
from ldm.networks.autoencoder import AutoencoderKL
from ldm.networks.layer_set import LayerSet, layers_of_this_device
from ldm.networks.layers import set_dtype, weights_of_products
from ldm.networks.text_encoder import TextEncoder
from ldm.networks.unet import UNetModel
from ldm.precision import default_precision


class DiffusionWrapper(nn.Cell):
    """Gives the checkpoint's name `model.diffusion_model`."""

    def __init__(self, config: ModelConfig, layers: LayerSet) -> None:
        super().__init__()
        self.diffusion_model = UNetModel(config.unet, layers)


class LatentDiffusion(nn.Cell):
    """UNet, VAE and text encoder.

    Whoever holds this cell, or one of its networks, must not prefix its names again.
    """

    def __init__(self, config: ModelConfig, layers: LayerSet) -> None:
        super().__init__(auto_prefix=True)
        self.config, self.layers = config, layers
        self.model = DiffusionWrapper(config, layers)
        self.first_stage_model = AutoencoderKL(config.autoencoder, layers)
        self.cond_stage_model = TextEncoder(config.text_encoder, layers)
        for name, parameter in self.parameters_and_names():
            parameter.name = name

    @property
    def unet(self) -> UNetModel:
        return self.model.diffusion_model

    def parameter_names(self) -> list[str]:
        """In the order of a checkpoint."""
        return [parameter.name for parameter in self.get_parameters()]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, in the order of a checkpoint."""
        return {parameter.name: tuple(parameter.shape) for parameter in self.get_parameters()}

    def cast_weights(self) -> None:
        """For inference alone: weights are cast to the compute dtype once, not in every pass."""
        for parameter in weights_of_products(self):
            set_dtype(parameter, self.unet.dtype)

    def take_out_frozen(self, trains_text: bool) -> list[nn.Cell]:
        """The networks that have no part in the training; they are no part of this cell afterwards."""
        names = ["first_stage_model"] + ([] if trains_text else ["cond_stage_model"])
        networks = [getattr(self, name) for name in names]
        for name in names:
            delattr(self, name)
        return networks


def build_model(
    config: ModelConfig,
    initialise: bool = False,
    layers: LayerSet | None = None,
    fuses_attention: bool = True,
) -> LatentDiffusion:
    """The networks in inference mode: without values, for a checkpoint to fill, or with random ones
    (`initialise`).

    Args:
        layers: what they are built of; None: the layers of the device, in the configuration's precision.
        fuses_attention: by one kernel, where the device has it.
    """
    if config.precision == "auto":
        config = replace(config, precision=default_precision())
    layers = layers or layers_of_this_device(getattr(ms, config.precision), fuses_attention)
    if initialise:
        model = LatentDiffusion(config, layers)
    else:
        with no_init_parameters():
            model = LatentDiffusion(config, layers)
    return model.set_train(False)
