"""What changes from update to update on the host: the learning rate, and the loss scale of float16."""

import math

from ldm.options import TrainOptions

POLYNOMIAL_END = 1e-7  # where diffusers' polynomial ends unless told otherwise


class LearningRate:
    """Constant, with a linear warm-up and a decay where asked. Call with the number of updates done.

    Args:
        schedule: None: the 2023 example's, whose first update of the warm-up has 1/warmup_steps of the rate
            and which decays as a cosine; or a name of ldm.fields.LR_SCHEDULES: as diffusers' `get_scheduler`
            computes it, with a warm-up from 0.
        end: of the decay.
        decay_steps: updates of the decay after the warm-up; 0: none.
        cycles: of cosine_with_restarts.
        power: of polynomial.
    """

    def __init__(  # noqa: PLR0913
        self, start: float, end: float | None = None, warmup_steps: int = 0, decay_steps: int = 0,
        schedule: str | None = None, cycles: int = 1, power: float = 1.0,
    ) -> None:  # fmt: skip
        self.start, self.end, self.schedule = start, end or 0.0, schedule
        if schedule == "polynomial" and end is None:
            self.end = min(POLYNOMIAL_END, start)
        self.warmup_steps, self.decay_steps, self.cycles, self.power = (
            warmup_steps,
            decay_steps,
            cycles,
            power,
        )

    @classmethod
    def of(cls, options: TrainOptions) -> "LearningRate":
        """As a training's options say."""
        return cls(
            options.start_learning_rate, options.end_learning_rate, options.warmup_steps, options.decay_steps,
            options.lr_schedule, options.lr_cycles, options.lr_power,
        )  # fmt: skip

    def __call__(self, global_step: int) -> float:
        if global_step < self.warmup_steps:
            return self.start * (global_step + (self.schedule is None)) / self.warmup_steps
        if not self.decay_steps or self.schedule == "constant":
            return self.start
        done = min(1.0, (global_step - self.warmup_steps) / self.decay_steps)
        return self.end + (self.start - self.end) * self._left(done)

    def _left(self, done: float) -> float:
        """Which part of the way down is still to go, after a part of the decay."""
        if self.schedule == "linear":
            return 1 - done
        if self.schedule == "polynomial":
            return (1 - done) ** self.power
        if self.schedule == "cosine_with_restarts":
            done = done * self.cycles % 1.0 if done < 1 else 1.0
        return 0.5 * (1 + math.cos(math.pi * done))


class LossScale:
    """Dynamic loss scale (Micikevicius et al. 2018): shrinks at an overflow, grows after `window` updates
    without one.
    """

    def __init__(self, initial: float, factor: float, window: int) -> None:
        self.value, self.factor, self.window, self.good_updates = initial, factor, window, 0

    def update(self, overflow: bool) -> None:
        self.good_updates = 0 if overflow else self.good_updates + 1
        if overflow:
            self.value = max(1.0, self.value / self.factor)
        elif self.good_updates >= self.window:
            self.value, self.good_updates = self.value * self.factor, 0
