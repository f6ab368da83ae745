import dataclasses

import numpy as np
import torch
from conftest import SHALLOW
from diffusers import DDPMScheduler

from ldm.schedule import NoiseSchedule, add_noise, velocity


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
