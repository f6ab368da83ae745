import dataclasses

import numpy as np
import pytest
import torch
from conftest import SHALLOW
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm.config import check_model_config
from ldm.schedule import NoiseSchedule, add_noise, min_snr_weights, velocity
from ldm.values import ConfigError


def levels(schedule, t):
    return schedule.sqrt_alpha[t], schedule.sqrt_one_minus_alpha[t]


def target(schedule, x0, noise, t):
    """As ldm/training/loss.py chooses."""
    is_v = schedule.prediction_type == "v_prediction"
    return velocity(x0, noise, *levels(schedule, t)) if is_v else noise


def test_noise_and_targets_equal_diffusers():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 5, 4, 3, 3))
    t = np.array([0, 1, 500, 998, 999])
    for prediction_type in ("epsilon", "v_prediction"):
        ours = NoiseSchedule(dataclasses.replace(SHALLOW.noise_schedule, prediction_type=prediction_type))
        theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
        assert np.abs(ours.alphas_cumprod - theirs.alphas_cumprod.numpy()).max() < 1e-6  # theirs is float32
        tensors = torch.from_numpy(x), torch.from_numpy(noise), torch.from_numpy(t)
        column = t[:, None, None, None]
        assert (
            np.abs(add_noise(x, noise, *levels(ours, column)) - theirs.add_noise(*tensors).numpy()).max()
            < 1e-5
        )
        wanted = noise if prediction_type == "epsilon" else theirs.get_velocity(*tensors).numpy()
        assert np.abs(target(ours, x, noise, column) - wanted).max() < 1e-5


def test_predictions_convert_back():
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 1, 4, 3, 3))
    for prediction_type in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule(dataclasses.replace(SHALLOW.noise_schedule, prediction_type=prediction_type))
        for t in (0, 400, 999):
            x_t, prediction = add_noise(x0, noise, *levels(schedule, t)), target(schedule, x0, noise, t)
            assert np.abs(schedule.to_eps(prediction, x_t, t) - noise).max() < 1e-12
            assert np.abs(schedule.to_x0(prediction, x_t, t) - x0).max() < 1e-11


def schedule_of(**changes) -> NoiseSchedule:
    return NoiseSchedule(dataclasses.replace(SHALLOW.noise_schedule, **changes))


def test_zero_terminal_snr_is_that_of_diffusers():
    ours = schedule_of(prediction_type="v_prediction", zero_terminal_snr=True)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0).numpy()
    assert np.abs(ours.alphas_cumprod - theirs).max() < 1e-12 and ours.alphas_cumprod[-1] == 0
    assert ours.alphas_cumprod[0] == schedule_of().alphas_cumprod[0]  # by its algorithm
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 1, 4, 3, 3))
    for t in (0, 400, 999):
        x_t, prediction = add_noise(x0, noise, *levels(ours, t)), target(ours, x0, noise, t)
        assert np.abs(ours.to_eps(prediction, x_t, t) - noise).max() < 1e-12
        assert np.abs(ours.to_x0(prediction, x_t, t) - x0).max() < 1e-12
    assert np.array_equal(add_noise(x0, noise, *levels(ours, 999)), noise)


def test_a_model_that_predicts_the_noise_has_no_zero_terminal_snr():
    schedule = dataclasses.replace(SHALLOW.noise_schedule, prediction_type="epsilon", zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="zero_terminal_snr needs a model that predicts v"):
        check_model_config(dataclasses.replace(SHALLOW, noise_schedule=schedule), "x.yaml")


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 50, 999, 1000])
def test_trailing_steps_are_those_of_diffusers(steps):
    scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    ours = schedule_of().sampling_timesteps(steps, "trailing")
    assert list(ours) == scheduler.timesteps.tolist() and ours[0] == 999


def test_min_snr_weights_by_hand():
    """At t = 0, 500, 999 alpha_bar is .99915, .2763, .00466 (Stable Diffusion's schedule), the SNR 1175.5,
    .3818, .00468.
    """
    expected = {
        "epsilon": [5 / 1175.47, 1, 1],
        "v_prediction": [5 / 1176.47, 0.2763, 0.00466],
    }
    for prediction_type, values in expected.items():
        weights = min_snr_weights(schedule_of(prediction_type=prediction_type), 5.0)
        assert np.allclose(weights[[0, 500, 999]], values, rtol=2e-3), weights[[0, 500, 999]]
    weights = min_snr_weights(schedule_of(prediction_type="v_prediction", zero_terminal_snr=True), 5.0)
    assert weights[-1] == 0 and np.isfinite(weights).all()
