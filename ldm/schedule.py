"""The noise schedule: alphas in float64, and the formulas that tie latents, noise and prediction together.

Everything works on NumPy arrays and Python ints; the training loss takes its two tables from here.
"""

import numpy as np

from ldm.config import ScheduleConfig


def add_noise(latents, noise, signal, level):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4); arrays or tensors.

    Args:
        signal, level: sqrt_alpha and sqrt_one_minus_alpha of the schedule at t.
    """
    return signal * latents + level * noise


def velocity(latents, noise, signal, level):
    """v at x_t, what the network answers with `v_prediction` (Salimans & Ho 2022, appendix D)."""
    return signal * noise - level * latents


class NoiseSchedule:
    """Scaled-linear betas (Rombach et al. 2022): the square roots of beta are spaced evenly.

    Attributes:
        alphas_cumprod: (T,) float64, the product of (1 - beta) up to each step ("alpha bar", Ho et al. 2020).
        sqrt_alpha, sqrt_one_minus_alpha: (T,) float64, signal and noise level of x_t.
        prediction_type: what the network predicts, `epsilon` or `v_prediction`.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps) ** 2
        self.timesteps = config.timesteps
        self.prediction_type = config.prediction_type
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.sqrt_alpha = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alpha = np.sqrt(1 - self.alphas_cumprod)

    def to_eps(self, prediction: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
        """The noise in x_t according to the prediction."""
        if self.prediction_type == "epsilon":
            return prediction
        return self.sqrt_alpha[t] * prediction + self.sqrt_one_minus_alpha[t] * x_t

    def to_x0(self, prediction: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
        """The clean latents according to the prediction."""
        return (x_t - self.sqrt_one_minus_alpha[t] * self.to_eps(prediction, x_t, t)) / self.sqrt_alpha[t]

    def sampling_timesteps(self, steps: int, spacing: str) -> np.ndarray:
        """(steps,) int: the time steps of a sampler, falling, no two the same.

        With as many steps as the schedule has these are all of them. Fewer are, by `spacing`:

        - `spread`: from 1 on at equal distances, rounded down, so that the first to be sampled lies near the
          last of the schedule whatever their number. Where that divides the schedule, they are `leading`.
        - `leading`: from 1 on at equal whole distances, the rule of DDIM and PLMS in Stable Diffusion
          (Rombach et al. 2022). Of 350 the first to be sampled is 699, where an image is not all noise.
        - `linspace`: from the last of the schedule to (not with) 0, the rule of the DPM solvers.

        Raises:
            ValueError: the schedule has fewer steps, or less than one is asked for.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"sampling_steps must be 1 to {self.timesteps}, got {steps}")
        if steps == self.timesteps:
            rising = np.arange(steps)
        elif spacing == "linspace":
            rising = np.linspace(0, self.timesteps - 1, steps + 1).round()[1:].astype(int)
        elif spacing == "spread":
            rising = np.arange(steps) * self.timesteps // steps + 1
        else:
            rising = np.arange(steps) * (self.timesteps // steps) + 1
        return rising[::-1]
