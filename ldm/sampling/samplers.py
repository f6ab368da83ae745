"""Samplers: from noise x_T to clean latents, one function each. They know a denoiser, never a network.

A denoiser is called as `denoise(x_t, t)` with x_t (B, C, H, W) and the step index t, and answers what the
network predicts there; the schedule says what that means. The time steps come falling, as `timesteps_of`
gives them. Each sampler is a generator that yields the latents after every step. Arithmetic is float64 on the
host: the latents are small, and the networks' time outweighs it by far.
"""

from collections.abc import Callable, Iterator

import numpy as np

from ldm.schedule import NoiseSchedule

Denoiser = Callable[[np.ndarray, int], np.ndarray]
Latents = Iterator[np.ndarray]
LEAST_ALPHA_BAR = 2.0**-24


def _ddim_step(schedule: NoiseSchedule, x, prediction, t: int, following: int, sigma=0.0, noise=0.0):
    """One step from t to `following` (Song et al. 2021, eq. 12)."""
    alpha = schedule.alphas_cumprod[following]
    eps, x0 = schedule.to_eps(prediction, x, t), schedule.to_x0(prediction, x, t)
    return np.sqrt(alpha) * x0 + np.sqrt(1 - alpha - sigma**2) * eps + sigma * noise


def _with_following(timesteps: np.ndarray) -> Iterator[tuple[int, int]]:
    """Each time step with the one after it; after the last comes 0."""
    return zip(map(int, timesteps), [*map(int, timesteps[1:]), 0])


def sample_ddim(
    denoise: Denoiser, x_T: np.ndarray, schedule: NoiseSchedule, timesteps: np.ndarray, eta: float = 0.0,
    noise: Callable[[int], np.ndarray] | None = None,
) -> Latents:  # fmt: skip
    """DDIM (Song et al. 2021); ends at the noise of step 0.

    With eta > 0, `noise(i)` gives step i's fresh noise, shaped as x_T; eta 1 is DDPM's.
    """
    if eta and noise is None:
        raise ValueError("eta > 0 needs noise")
    x = x_T
    for index, (t, following) in enumerate(_with_following(timesteps)):
        alpha, before = schedule.alphas_cumprod[t], schedule.alphas_cumprod[following]
        sigma = eta * np.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))  # eq. 16
        x = _ddim_step(schedule, x, denoise(x, t), t, following, sigma, noise(index) if eta else 0.0)
        yield x


def sample_plms(
    denoise: Denoiser, x_T: np.ndarray, schedule: NoiseSchedule, timesteps: np.ndarray
) -> Latents:  # fmt: skip
    """PLMS: pseudo linear multi-steps (Liu et al. 2022, PNDM, eqs. 9, 11-13), a first step of second order.

    Combines predictions as the network gives them, also v. The first step calls the denoiser twice.
    """
    x, history = x_T, []
    for t, following in _with_following(timesteps):
        prediction = denoise(x, t)
        if not history and len(timesteps) > 1:  # pseudo improved Euler
            ahead = _ddim_step(schedule, x, prediction, t, following)
            blend = (prediction + denoise(ahead, following)) / 2
        else:  # Adams-Bashforth weights over the last predictions
            recent = [prediction, *history]
            weights = {
                1: (1,),
                2: (3 / 2, -1 / 2),
                3: (23 / 12, -16 / 12, 5 / 12),
                4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
            }
            blend = sum(w * p for w, p in zip(weights[len(recent)], recent))
        history = [prediction, *history[:2]]
        x = _ddim_step(schedule, x, blend, t, following)
        yield x


def _half_log_snr(alpha_bar):
    """lambda = log(alpha / sigma) (Lu et al. 2022); infinite where no noise is left."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(alpha_bar) - np.log1p(-alpha_bar))


def _levels(schedule: NoiseSchedule, timesteps: np.ndarray, last_alpha_bar: float):
    """alpha, sigma and lambda at each time step and behind the last.

    In pure noise lambda is infinite: as in diffusers, a trace of the image is left there.
    """
    alpha_bar = np.append(schedule.alphas_cumprod[timesteps].clip(LEAST_ALPHA_BAR), last_alpha_bar)
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), _half_log_snr(alpha_bar)


def sample_dpm_solver(
    denoise: Denoiser, x_T: np.ndarray, schedule: NoiseSchedule, timesteps: np.ndarray
) -> Latents:  # fmt: skip
    """DPM-Solver, second order, multi-step, on the noise (Lu et al. 2022); ends at the noise of step 0."""
    alpha, sigma, lam = _levels(schedule, timesteps, schedule.alphas_cumprod[0])
    x, before = x_T, None
    for i, t in enumerate(timesteps):
        eps = schedule.to_eps(denoise(x, int(t)), x, t)
        h = lam[i + 1] - lam[i]
        estimate = eps
        if before is not None and not (
            i == len(timesteps) - 1 and len(timesteps) < 15
        ):  # few steps: the last of first order, stable
            estimate = eps + 0.5 * h / (lam[i] - lam[i - 1]) * (eps - before)
        x = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * np.expm1(h) * estimate
        before = eps
        yield x


def sample_dpm_solver_pp(
    denoise: Denoiser, x_T: np.ndarray, schedule: NoiseSchedule, timesteps: np.ndarray
) -> Latents:  # fmt: skip
    """DPM-Solver++ (2M), on the clean latents (Lu et al. 2022b, algorithm 2); the last step, of first order,
    ends at x_0.
    """
    alpha, sigma, lam = _levels(schedule, timesteps, 1.0)
    x, before = x_T, None
    for i, t in enumerate(timesteps):
        x0 = schedule.to_x0(denoise(x, int(t)), x, t)
        h = lam[i + 1] - lam[i]
        estimate = x0
        if before is not None and i < len(timesteps) - 1:
            estimate = x0 + 0.5 * h / (lam[i] - lam[i - 1]) * (x0 - before)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * estimate
        before = x0
        yield x


def sample_uni_pc(
    denoise: Denoiser, x_T: np.ndarray, schedule: NoiseSchedule, timesteps: np.ndarray
) -> Latents:  # fmt: skip
    """UniPC, second order, B2(h), on the clean latents (Zhao et al. 2023): a predictor, corrected by the next
    evaluation.

    The corrector reuses the network's answer at the predicted point, so a step costs one evaluation.
    """
    alpha, sigma, lam = _levels(schedule, timesteps, 1.0)
    x, start, x0s = x_T, None, []  # start: the latents that the last predictor step began from
    for i, t in enumerate(timesteps):
        x0 = schedule.to_x0(denoise(x, int(t)), x, t)
        if i > 0:  # corrector of the step that led here
            h = lam[i] - lam[i - 1]
            b = np.expm1(-h)
            base = sigma[i] / sigma[i - 1] * start - alpha[i] * b * x0s[-1]
            ahead = x0 - x0s[-1]
            if i == 1:  # first order: rho = 1/2
                x = base - alpha[i] * b * 0.5 * ahead
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                behind = (x0s[-2] - x0s[-1]) / r
                phi1 = b / -h - 1
                phi2 = phi1 / -h - 0.5
                rho = np.linalg.solve([[1, 1], [r, 1]], [phi1 / b, 2 * phi2 / b])
                x = base - alpha[i] * b * (rho[0] * behind + rho[1] * ahead)
        h = lam[i + 1] - lam[i]
        b = np.expm1(-h)
        start = x
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * b * x0
        if 0 < i < len(timesteps) - 1:
            r = (lam[i - 1] - lam[i]) / h
            x = x - alpha[i + 1] * b * 0.5 * (x0s[-1] - x0) / r
        x0s = [*x0s[-1:], x0]
        yield x


SAMPLERS = {
    "plms": sample_plms,
    "ddim": sample_ddim,
    "dpm_solver": sample_dpm_solver,
    "dpm_solver_pp": sample_dpm_solver_pp,
    "uni_pc": sample_uni_pc,
}
STRIDED = ("plms", "ddim")  # the others are solvers in lambda


def timesteps_of(sampler: str, schedule: NoiseSchedule, steps: int, spacing: str = "auto") -> np.ndarray:
    """The time steps that a sampler of SAMPLERS goes through: see NoiseSchedule.sampling_timesteps.

    Args:
        spacing: auto: `spread` for DDIM and PLMS, `linspace` for the DPM solvers; and `trailing` for all
            where the schedule ends in pure noise.
    """
    own = "trailing" if schedule.ends_in_noise else "spread" if sampler in STRIDED else "linspace"
    return schedule.sampling_timesteps(steps, own if spacing == "auto" else spacing)
