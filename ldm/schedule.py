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


def _ending_in_noise(alphas_cumprod: np.ndarray) -> np.ndarray:
    """A schedule shifted and scaled so that nothing of the image is left at its last step, and its first is
    as it was (Lin et al. 2024, arXiv 2305.08891, algorithm 1).
    """
    sqrt_alpha = np.sqrt(alphas_cumprod)
    first, last = sqrt_alpha[0], sqrt_alpha[-1]
    return ((sqrt_alpha - last) * first / (first - last)) ** 2


def min_snr_weights(schedule: "NoiseSchedule", gamma: float) -> np.ndarray:
    """(T,) float64: what a loss at each step counts, so that those of little noise do not outweigh the others
    (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    The paper clamps the weight of a loss on x_0 at min(SNR, gamma); a loss on the noise is SNR times that on
    x_0, and one on v (SNR + 1) times.
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    own = snr + 1 if schedule.prediction_type == "v_prediction" else snr
    return np.minimum(snr, gamma) / own


class NoiseSchedule:
    """Scaled-linear betas (Rombach et al. 2022): the square roots of beta are spaced evenly. With
    `zero_terminal_snr` these are rescaled, see `_ending_in_noise`.

    Attributes:
        alphas_cumprod: (T,) float64, the product of (1 - beta) up to each step ("alpha bar", Ho et al. 2020).
        sqrt_alpha, sqrt_one_minus_alpha: (T,) float64, signal and noise level of x_t.
        prediction_type: what the network predicts, `epsilon` or `v_prediction`.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps) ** 2
        self.timesteps = config.timesteps
        self.prediction_type, self.ends_in_noise = config.prediction_type, config.zero_terminal_snr
        self.alphas_cumprod = np.cumprod(1 - betas)
        if config.zero_terminal_snr:
            self.alphas_cumprod = _ending_in_noise(self.alphas_cumprod)
        self.sqrt_alpha = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alpha = np.sqrt(1 - self.alphas_cumprod)

    def to_eps(self, prediction: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
        """The noise in x_t according to the prediction."""
        if self.prediction_type == "epsilon":
            return prediction
        return self.sqrt_alpha[t] * prediction + self.sqrt_one_minus_alpha[t] * x_t

    def to_x0(self, prediction: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
        """The clean latents according to the prediction."""
        if self.ends_in_noise:  # by v; where an image is all noise, nothing can be divided by its share
            return self.sqrt_alpha[t] * x_t - self.sqrt_one_minus_alpha[t] * prediction
        return (x_t - self.sqrt_one_minus_alpha[t] * self.to_eps(prediction, x_t, t)) / self.sqrt_alpha[t]

    def sampling_timesteps(self, steps: int, spacing: str) -> np.ndarray:
        """(steps,) int: the time steps of a sampler, falling, no two the same.

        With as many steps as the schedule has these are all of them. Fewer are, by `spacing`:

        - `spread`: from 1 on at equal distances, rounded down, so that the first to be sampled lies near the
          last of the schedule whatever their number. Where that divides the schedule, they are `leading`.
        - `leading`: from 1 on at equal whole distances, the rule of DDIM and PLMS in Stable Diffusion
          (Rombach et al. 2022). Of 350 the first to be sampled is 699, where an image is not all noise.
        - `trailing`: up to the last of the schedule at equal distances (Lin et al. 2024, table 2), for models
          with `zero_terminal_snr`.
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
        elif spacing == "trailing":
            # as diffusers counts: down from the end, each rounded
            rising = (
                np.round(np.arange(self.timesteps, 0, -self.timesteps / steps))[:steps][::-1].astype(int) - 1
            )
        elif spacing == "spread":
            rising = np.arange(steps) * self.timesteps // steps + 1
        else:
            rising = np.arange(steps) * (self.timesteps // steps) + 1
        return rising[::-1]
