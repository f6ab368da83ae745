"""Whole trajectories against diffusers' schedulers (in float64), on the same denoiser."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SHALLOW
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

from ldm.fields import SAMPLER_NAMES
from ldm.sampling.samplers import SAMPLERS, sample_ddim
from ldm.schedule import NoiseSchedule, add_noise

BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STABLE_DIFFUSION = dict(steps_offset=1, set_alpha_to_one=False)
TOLERANCE = (
    1e-4  # diffusers keeps its schedule in float32: 1e-7 a step, amplified by 1 / alpha at the noisy end
)


def schedule_of(prediction_type: str) -> NoiseSchedule:
    return NoiseSchedule(dataclasses.replace(SHALLOW.noise_schedule, prediction_type=prediction_type))


def denoise(x, t):
    """Smooth, not linear, dependent on the place and the step: stands for a network."""
    return 0.8 * np.tanh(0.9 * x + 0.1 * np.roll(x, 1, axis=-1)) + 0.2 * np.sin(t / 150)


def reference(scheduler, steps, x_T, **extra):
    scheduler.set_timesteps(steps)
    x, trajectory = torch.from_numpy(x_T), []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(denoise(x.numpy(), int(t))), t, x, **extra).prev_sample
        trajectory.append(x.numpy().copy())
    return trajectory


def make_scheduler(name, prediction_type):
    common = BETAS | dict(prediction_type=prediction_type)
    if name == "plms":
        return PNDMScheduler(**common, skip_prk_steps=True, **STABLE_DIFFUSION)
    if name == "ddim":
        return DDIMScheduler(**common, clip_sample=False, **STABLE_DIFFUSION)
    if name == "dpm_solver_pp":
        return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2)
    return UniPCMultistepScheduler(**common, solver_order=2, solver_type="bh2")


@pytest.fixture
def x_T():
    return np.random.default_rng(0).standard_normal((2, 4, 6, 8))


def largest_difference(ours, theirs):
    assert len(ours) == len(theirs)
    return max(np.abs(a - b).max() / max(1, np.abs(b).max()) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if name != "dpm_solver"])
def test_trajectory_equals_diffusers(name, steps, prediction_type, x_T):
    ours = list(SAMPLERS[name](denoise, x_T, schedule_of(prediction_type), steps))
    theirs = reference(make_scheduler(name, prediction_type), steps, x_T)
    if name == "plms":  # diffusers counts the first step's two evaluations as two steps
        theirs = theirs[1:]
    error = largest_difference(ours, theirs)
    print(f"{name} {steps} {prediction_type}: {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 25])
def test_dpm_solver_equals_the_papers_formulas(steps, prediction_type, x_T):
    """DPM-Solver-2M from Lu et al. 2022 (eq. 3.7 and its multi-step form), written out with the paper's
    symbols.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.sqrt(np.cumprod(1 - betas))
    sigma = np.sqrt(1 - alpha**2)
    lam = np.log(alpha / sigma)
    times = [round(999 * k / steps) for k in range(steps, 0, -1)] + [0]

    def eps(x, t):
        prediction = denoise(x, t)
        return prediction if prediction_type == "epsilon" else alpha[t] * prediction + sigma[t] * x

    x, previous, theirs = x_T, None, []
    for i, (s, t) in enumerate(zip(times, times[1:])):
        h = lam[t] - lam[s]
        e = eps(x, s)
        x_next = alpha[t] / alpha[s] * x - sigma[t] * (np.exp(h) - 1) * e
        if previous is not None and (i < steps - 1 or steps >= 15):
            r = (lam[s] - lam[times[i - 1]]) / h
            x_next = x_next - sigma[t] * (np.exp(h) - 1) / (2 * r) * (e - previous)
        x, previous = x_next, e
        theirs.append(x)
    ours = list(SAMPLERS["dpm_solver"](denoise, x_T, schedule_of(prediction_type), steps))
    assert largest_difference(ours, theirs) <= 1e-9


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_eta_equals_diffusers(eta, x_T):
    rng = np.random.default_rng(3)
    noises = rng.standard_normal((10, *x_T.shape))
    ours = list(sample_ddim(denoise, x_T, schedule_of("epsilon"), 10, eta, noises.__getitem__))
    scheduler, x, theirs = make_scheduler("ddim", "epsilon"), torch.from_numpy(x_T), []
    scheduler.set_timesteps(10)
    for i, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(denoise(x.numpy(), int(t)))
        x = scheduler.step(output, t, x, eta=eta, variance_noise=torch.from_numpy(noises[i])).prev_sample
        theirs.append(x.numpy().copy())
    assert largest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_exact_denoiser_leads_to_its_picture(name, x_T):
    """With a denoiser that knows x_0, every sampler arrives there, up to the noise at which it stops."""
    schedule, x0 = schedule_of("epsilon"), np.random.default_rng(5).standard_normal(x_T.shape)
    x = add_noise(x0, x_T, schedule.sqrt_alpha[999], schedule.sqrt_one_minus_alpha[999])
    *_, last = SAMPLERS[name](
        lambda x, t: (x - schedule.sqrt_alpha[t] * x0) / schedule.sqrt_one_minus_alpha[t], x, schedule, 40
    )
    assert np.abs(last - x0).max() < 0.15


def test_steps_out_of_range_are_refused():
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match="sampling_steps"):
            next(sampler(denoise, np.zeros((1, 4, 2, 2)), schedule_of("epsilon"), 2000))
