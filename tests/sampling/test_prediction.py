"""Whether a UNet predicts what is said of it: the shipped model, which predicts v, as it is, and turned into
one that predicts the noise.
"""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT

from ldm.networks.latent_diffusion import build_model
from ldm.sampling.prediction import check_prediction, looks_like
from ldm.schedule import NoiseSchedule
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.choice import choose_config, other_prediction
from ldm.weights.source import open_weights


class TurnedIntoEpsilon:
    """The same knowledge, said in another way: epsilon = alpha v + sigma x_t."""

    def __init__(self, model, config) -> None:
        self.model, self.schedule = model, NoiseSchedule(config.noise_schedule)

    def unet(self, x_t, t, context):
        v = self.model.unet(x_t, t, context).asnumpy()
        return ms.Tensor(self.schedule.to_eps(v, x_t.asnumpy(), int(t.asnumpy()[0])).astype(np.float32))


@pytest.fixture(scope="module")
def tiny():
    source = open_weights(ROOT / "models/tiny_sd_v2.safetensors")
    source = choose_config(source)
    model = build_model(source.config)
    load_checkpoint(model, source)
    return source, model


def test_what_a_unet_predicts_is_seen(tiny):
    source, model = tiny
    assert looks_like(model, source.config) == "v_prediction"
    assert looks_like(TurnedIntoEpsilon(model, source.config), source.config) == "epsilon"
    assert ms.get_context("mode") == ms.GRAPH_MODE


def test_a_wrong_configuration_is_warned_of(tiny, caplog):
    source, model = tiny
    check_prediction(model, source)
    assert not caplog.text
    wrong = dataclasses.replace(source.config.noise_schedule, prediction_type="epsilon")
    source = dataclasses.replace(source, config=dataclasses.replace(source.config, noise_schedule=wrong))
    check_prediction(model, source)
    assert (
        "seems to predict v (v_prediction), the model configuration says the noise (epsilon)" in caplog.text
    )
    assert "give configs/train_dreambooth_tiny.yaml as the model configuration" in caplog.text
    caplog.clear()
    check_prediction(model, dataclasses.replace(source, is_stated=True))  # a folder says it itself
    assert not caplog.text


def test_the_other_configuration_is_named():
    from ldm.config import read_model_config
    from ldm.versions import VERSIONS

    pairs = {
        version: other_prediction(read_model_config(VERSIONS[version].model_config)) for version in VERSIONS
    }
    assert pairs["2.0"] == pairs["2.1"] == "configs/train_dreambooth_sd_v2_768_v.yaml"
    assert pairs["2.0-v"] == pairs["2.1-v"] == "configs/train_dreambooth_sd_v2.yaml"
    assert pairs["1.4"] is pairs["1.5"] is None
