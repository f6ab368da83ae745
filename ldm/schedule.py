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

    def strided_timesteps(self, steps: int) -> np.ndarray:
        """`steps` time steps, falling, at equal strides from 1 on: the rule of DDIM and PLMS in Stable
        Diffusion.
        """
        self._check(steps)
        return (np.arange(steps) * (self.timesteps // steps) + 1)[::-1].clip(max=self.timesteps - 1)

    def spaced_timesteps(self, steps: int) -> np.ndarray:
        """`steps` time steps, falling, evenly spaced from the last to (not with) 0: the rule of the DPM
        solvers.
        """
        self._check(steps)
        return np.linspace(0, self.timesteps - 1, steps + 1).round()[:0:-1].astype(int)

    def _check(self, steps: int) -> None:
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"sampling_steps must be 1 to {self.timesteps}, got {steps}")
