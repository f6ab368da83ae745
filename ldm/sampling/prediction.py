"""Whether a UNet predicts what its configuration says: a single file does not tell, and a wrong configuration
draws noise without an error.
"""

import logging

import mindspore as ms
import numpy as np

from ldm.config import ModelConfig
from ldm.device import is_dry_run
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.random_streams import IMAGE, stream
from ldm.weights.choice import PREDICTIONS, other_prediction
from ldm.weights.source import Source

SIDE = 16  # of the latents
logger = logging.getLogger(__name__)


def looks_like(model: LatentDiffusion, config: ModelConfig) -> str:
    """What the UNet predicts, by one evaluation at the last time step.

    There x_t is nearly all noise. A UNet that predicts the noise gives it back; v is alpha times the noise
    minus sigma times the picture (Salimans & Ho 2022), with alpha 0.07 there: hardly any of it.
    AUTOMATIC1111's program asks the same with constant latents.

    Returns:
        `epsilon`, `v_prediction`, or `neither` where the answer is no picture at all.
    """
    x = stream(0, IMAGE, 0).standard_normal((1, config.unet.in_channels, SIDE, SIDE)).astype(np.float32)
    context = np.zeros((1, config.text_encoder.context_length, config.unet.context_dim), np.float32)
    inputs = x, np.array([config.noise_schedule.timesteps - 1], np.int32), context
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)  # one evaluation is not worth a graph
    try:
        prediction = model.unet(*map(ms.Tensor, inputs)).asnumpy()
    finally:
        ms.set_context(mode=mode)
    if not np.isfinite(prediction).all() or not prediction.std():
        return "neither"
    return "epsilon" if np.corrcoef(x.ravel(), prediction.ravel())[0, 1] > 0.5 else "v_prediction"


def check_prediction(model: LatentDiffusion, source: Source) -> None:
    """Log a warning where the weights of a single file seem to predict something else than the configuration
    says.
    """
    config = source.config
    said = config.noise_schedule.prediction_type
    if source.is_stated or is_dry_run() or (found := looks_like(model, config)) == said:
        return
    if found == "neither":
        text = (
            "%s: the UNet answers NaN, or all the same: damaged weights, or float16 without upcast_attention"
        )
        logger.warning(text, source.path)
        return
    other = other_prediction(config)
    logger.warning(
        "%s: seems to predict %s, the model configuration says %s, with which it would draw noise%s",
        source.path, PREDICTIONS[found], PREDICTIONS[said],
        f"; if so, give {other} as the model configuration" if other else "",
    )  # fmt: skip
