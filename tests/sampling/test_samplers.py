"""Whole trajectories against diffusers' schedulers (in float64), on the same denoiser."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SHALLOW
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

from ldm.fields import SAMPLER_NAMES
from ldm.sampling.samplers import SAMPLERS, sample_ddim, timesteps_of
from ldm.schedule import NoiseSchedule, add_noise, velocity

BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STABLE_DIFFUSION = dict(steps_offset=1, set_alpha_to_one=False)
TOLERANCE = (
    1e-4  # diffusers keeps its schedule in float32: 1e-7 a step, amplified by 1 / alpha at the noisy end
)


def schedule_of(prediction_type: str) -> NoiseSchedule:
    return NoiseSchedule(dataclasses.replace(SHALLOW.noise_schedule, prediction_type=prediction_type))


def sampled(name, denoise, x_T, schedule, steps, spacing="auto"):
    return list(SAMPLERS[name](denoise, x_T, schedule, timesteps_of(name, schedule, steps, spacing)))


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
    ours = sampled(name, denoise, x_T, schedule_of(prediction_type), steps)
    theirs = reference(make_scheduler(name, prediction_type), steps, x_T)
    if name == "plms":  # diffusers counts the first step's two evaluations as two steps
        theirs = theirs[1:]
    error = largest_difference(ours, theirs)
    print(f"{name} {steps} {prediction_type}: {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp", "uni_pc"])
def test_trajectory_from_pure_noise_equals_diffusers(name, x_T):
    """With zero terminal SNR and trailing steps (Lin et al. 2024)."""
    noise = dataclasses.replace(
        SHALLOW.noise_schedule, prediction_type="v_prediction", zero_terminal_snr=True
    )
    schedule = NoiseSchedule(noise)
    ours = sampled(name, denoise, x_T, schedule, 10)
    assert timesteps_of(name, schedule, 10)[0] == 999
    scheduler = type(make_scheduler(name, "v_prediction")).from_config(
        make_scheduler(name, "v_prediction").config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    theirs = reference(scheduler, 10, x_T)
    error = largest_difference(ours, theirs)
    print(f"{name} from pure noise: {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["plms", "dpm_solver"])
def test_the_other_samplers_start_from_pure_noise_too(name, x_T):
    noise = dataclasses.replace(
        SHALLOW.noise_schedule, prediction_type="v_prediction", zero_terminal_snr=True
    )
    exact = np.random.default_rng(1).standard_normal(x_T.shape)
    schedule = NoiseSchedule(noise)

    def knows(x, t):
        """v of the image that is to be found."""
        a, s = schedule.sqrt_alpha[t], schedule.sqrt_one_minus_alpha[t]
        return (a * x - exact) / s

    found = sampled(name, knows, x_T, schedule, 30)[-1]
    assert np.isfinite(found).all() and np.abs(found - exact).max() < 0.2


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
    ours = sampled("dpm_solver", denoise, x_T, schedule_of(prediction_type), steps)
    assert largest_difference(ours, theirs) <= 1e-9


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_eta_equals_diffusers(eta, x_T):
    rng = np.random.default_rng(3)
    noises = rng.standard_normal((10, *x_T.shape))
    schedule = schedule_of("epsilon")
    timesteps = timesteps_of("ddim", schedule, 10)
    ours = list(sample_ddim(denoise, x_T, schedule, timesteps, eta, noises.__getitem__))
    scheduler, x, theirs = make_scheduler("ddim", "epsilon"), torch.from_numpy(x_T), []
    scheduler.set_timesteps(10)
    for i, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(denoise(x.numpy(), int(t)))
        x = scheduler.step(output, t, x, eta=eta, variance_noise=torch.from_numpy(noises[i])).prev_sample
        theirs.append(x.numpy().copy())
    assert largest_difference(ours, theirs) <= TOLERANCE


# from as few as there can be, over counts that do and do not divide 1,000, to all there are
COUNTS = (1, 2, 3, 7, 14, 15, 40, 350, 501, 600, 999, 1000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_exact_denoiser_leads_to_its_picture_at_every_count(name, prediction_type, x_T):
    """With a denoiser that knows x_0, every sampler arrives there, up to the noise of step 0 or 1; PLMS,
    which mixes the v of different steps, in very few steps only nearly.
    """
    schedule, x0 = schedule_of(prediction_type), np.random.default_rng(5).standard_normal(x_T.shape)

    def knows(x, t):
        noise = (x - schedule.sqrt_alpha[t] * x0) / schedule.sqrt_one_minus_alpha[t]
        levels = schedule.sqrt_alpha[t], schedule.sqrt_one_minus_alpha[t]
        return noise if prediction_type == "epsilon" else velocity(x0, noise, *levels)

    for steps in COUNTS:
        first = timesteps_of(name, schedule, steps)[0]
        x = add_noise(x0, x_T, schedule.sqrt_alpha[first], schedule.sqrt_one_minus_alpha[first])
        last = sampled(name, knows, x, schedule, steps)[-1]
        assert np.abs(last - x0).max() < (0.15 if steps >= 10 else 1), steps


def test_time_steps_at_every_count():
    """Each once, falling, from near the last one; where the count divides 1,000, those of 2023."""
    schedule = schedule_of("epsilon")
    for name in SAMPLER_NAMES:
        for steps in range(1, 1001):
            t = timesteps_of(name, schedule, steps)
            assert len(t) == steps and (np.diff(t) < 0).all() and t[-1] >= 0 and t[0] <= 999, (name, steps)
            if name in ("plms", "ddim"):
                assert t[0] >= 999 - 1000 / steps, (name, steps)
                if 1000 % steps == 0 and steps < 1000:
                    assert (t == timesteps_of(name, schedule, steps, "leading")).all()
            else:
                assert t[0] == 999
    assert list(timesteps_of("ddim", schedule, 10)) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert timesteps_of("plms", schedule, 350)[0] == 998  # of 2023: 699
    assert timesteps_of("plms", schedule, 350, "leading")[0] == 699
    assert timesteps_of("ddim", schedule, 1000, "leading")[0] == 999


def test_steps_out_of_range_are_refused():
    for name in SAMPLERS:
        for steps in (0, 1001):
            with pytest.raises(ValueError, match="sampling_steps must be 1 to 1000"):
                timesteps_of(name, schedule_of("epsilon"), steps)
