"""Which networks a run trains, and how they are made ready for it."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.device import is_on_cpu
from ldm.fields import OPTIMIZERS
from ldm.memory import LARGE, memory_is_low, training_bytes
from ldm.networks.attention import BasicTransformerBlock
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.networks.layers import set_dtype, weights_of_products
from ldm.options import TrainOptions
from ldm.tokenizer import token_of
from ldm.training.lora import LoraPlan
from ldm.values import ConfigError
from ldm.weights.embeddings import read_embedding

logger = logging.getLogger(__name__)


def trained_networks(model: LatentDiffusion, train_text_encoder: bool) -> list[nn.Cell]:
    return [model.unet] + ([model.cond_stage_model] if train_text_encoder else [])


class Values(NamedTuple):
    """How many the whole model has; how many are trained, and are in networks that the training uses; and
    the memory that it may need.
    """

    whole: int
    trained: int
    used: int
    bytes_needed: int


def count_values(model: LatentDiffusion, options: TrainOptions, lora: LoraPlan | None = None) -> Values:
    def size(networks) -> int:
        return sum(parameter.size for network in networks for parameter in network.get_parameters())

    trained = lora.values if lora else size(trained_networks(model, options.train_text_encoder))
    used = size(trained_networks(model, options.trains_text))
    return Values(size([model]), trained, used, training_bytes(used, trained, OPTIMIZERS[options.optim]))


def settle_recompute(
    recompute: bool | None, bytes_needed: int, dropout: float, has_lora: bool = False
) -> bool:
    """Whether feed-forward layers are computed twice; left open (None), on a CPU where memory is low, and
    with LoRA, which is there to save it, for every large model.

    Raises:
        ValueError: it is asked for with dropout, which would drop other values the second time.
    """
    if recompute and dropout:
        raise ValueError(
            "recompute does not work with dropout (of the UNet, or lora_dropout): leave one of them out"
        )
    if recompute is not None:
        return recompute
    saves = memory_is_low(bytes_needed) or has_lora and bytes_needed >= LARGE
    is_on = is_on_cpu() and not dropout and saves
    if is_on:
        logger.info(
            "to save memory, feed-forward layers are computed twice (--recompute), for about 5% of a step's "
            "time"
        )
    return is_on


def make_trainable(
    model: LatentDiffusion, options: TrainOptions, lora: LoraPlan | None = None
) -> list[Parameter]:
    """Put the networks that are trained into training mode, freeze all else; with LoRA their weights, too,
    to which additions are put that are trained.

    Returns the trained parameters.

    They come reversed, so that MindSpore computes each weight's gradient as soon as the backward pass reaches
    its layer and can free that layer's activations: it orders kernels from a graph's outputs.
    """
    networks = trained_networks(model, options.trains_text)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    if lora:
        for network in networks:
            cast_frozen(network, model.unet.dtype)
        trained = lora.add_to(model, options.lora_dropout, options.seed)
    else:
        whole = trained_networks(model, options.train_text_encoder)
        trained = [parameter for network in whole for parameter in network.get_parameters()]
    if options.train_token is not None:
        text = model.cond_stage_model.transformer
        trained = [parameter for parameter in trained if parameter is not text.embedding_table]
        trained.append(row := text.take_out_word(token := token_of(options.train_token)))
        if options.embedding_path:
            row.set_data(Tensor(start_of_word(Path(options.embedding_path), token, row.shape[1])))
    for parameter in trained:
        parameter.requires_grad = True
    for network in networks:
        network.set_train(True)
    if options.recompute:
        for _, cell in model.unet.cells_and_names():
            if isinstance(cell, BasicTransformerBlock):
                cell.recompute_feed_forward()
    return [parameter for network in networks for parameter in reversed(network.trainable_params())]


def start_of_word(path: Path, token: int, width: int) -> np.ndarray:
    """(1, width) of a file. Raises ConfigError where it is of another word."""
    its_token, row = read_embedding(path, width)
    if its_token != token:
        raise ConfigError(f"embedding_path {path}: is not of the word of train_token")
    return row[None]


def cast_frozen(network: nn.Cell, dtype) -> None:
    """Weights that stay as they are: cast once, not in every pass."""
    for parameter in weights_of_products(network):
        set_dtype(parameter, dtype)
