"""Which networks a run trains, and how they are made ready for it."""

import logging
from typing import NamedTuple

from mindspore import Parameter, nn

from ldm.device import is_on_cpu
from ldm.memory import memory_is_low
from ldm.networks.attention import BasicTransformerBlock
from ldm.networks.latent_diffusion import LatentDiffusion

logger = logging.getLogger(__name__)


def trained_networks(model: LatentDiffusion, train_text_encoder: bool) -> list[nn.Cell]:
    return [model.unet] + ([model.cond_stage_model] if train_text_encoder else [])


class Values(NamedTuple):
    """How many the whole model has, and the networks that are trained."""

    whole: int
    trained: int


def count_values(model: LatentDiffusion, train_text_encoder: bool) -> Values:
    networks = trained_networks(model, train_text_encoder)
    trained = sum(parameter.size for network in networks for parameter in network.get_parameters())
    return Values(sum(parameter.size for parameter in model.get_parameters()), trained)


def settle_recompute(recompute: bool | None, trained_values: int, dropout: float) -> bool:
    """Whether feed-forward layers are computed twice; left open (None), on a CPU where memory is low.

    Raises:
        ValueError: it is asked for with dropout, which would drop other values the second time.
    """
    if recompute and dropout:
        raise ValueError(
            "recompute does not work with dropout: set unet dropout to 0, or leave recompute out"
        )
    if recompute is not None:
        return recompute
    is_on = is_on_cpu() and not dropout and memory_is_low(4 * trained_values)
    if is_on:
        logger.info(
            "low memory: feed-forward layers are computed twice (--recompute), for about 5% of a step's time"
        )
    return is_on


def make_trainable(model: LatentDiffusion, train_text_encoder: bool, recompute: bool) -> list[Parameter]:
    """Put the networks that are trained into training mode, freeze the others.

    Returns the trained parameters.

    They come reversed, so that MindSpore computes each weight's gradient as soon as the backward pass reaches
    its layer and can free that layer's activations: it orders kernels from a graph's outputs.

    Args:
        recompute: see settle_recompute.
    """
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    networks = trained_networks(model, train_text_encoder)
    for network in networks:
        network.set_train(True)
        for parameter in network.get_parameters():
            parameter.requires_grad = True
    if recompute:
        for _, cell in model.unet.cells_and_names():
            if isinstance(cell, BasicTransformerBlock):
                cell.recompute_feed_forward()
    return [parameter for network in networks for parameter in reversed(network.trainable_params())]
