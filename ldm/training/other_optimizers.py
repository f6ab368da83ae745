"""Adafactor, Lion and Prodigy. Which one a training has is said by `--optim`."""

import math
from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from ldm.device import has_newer_kernels, is_on_cpu
from ldm.operators import library
from ldm.options import TrainOptions
from ldm.training.masters import in_place
from ldm.training.optim import AdamW, FusedAdamW, OperatorAdamW, Optimizer, Trainees, zeros_beside
from ldm.training.sums import sum_of_all

LEAST_SQUARE = 1e-30  # Adafactor's epsilon 1
FIRST_DISTANCE, EPSILON = 1e-6, 1e-8  # Prodigy's d_0 and epsilon
_lion = ops.MultitypeFuncGraph("lion")
_factored = ops.MultitypeFuncGraph("factored")
_prodigy_sums = ops.MultitypeFuncGraph("prodigy_sums")
_prodigy_step = ops.MultitypeFuncGraph("prodigy_step")


@_lion.register("Function", "Number", "Number", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Bool")
def _lion_one(put, beta1, beta2, rate, decay, parameter, moment, gradient, decayed):  # noqa: PLR0913
    gradient = gradient.astype(ms.float32)
    kept = parameter
    if decayed:
        kept = parameter * (1 - decay)
    moved = kept - rate * ops.sign(beta1 * moment + (1 - beta1) * gradient)
    followed = beta2 * moment + (1 - beta2) * gradient
    return put(moment, ops.depend(followed, put(parameter, moved)))


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of a moment is the update, and that
    moment is all that is kept: half of AdamW's state.
    """

    NAMES = ("lion_m.",)

    def __init__(self, *arguments, **more) -> None:
        super().__init__(*arguments, **more)
        self.put = in_place()

    def scalars(self, step: int, learning_rate: float) -> list:  # noqa: ARG002 (as every optimizer)
        """Rate and decay of each kind of parameter."""
        rates = self.rates(learning_rate)
        return [Tensor(value, ms.float32) for rate in rates for value in (rate, rate * self.weight_decay)]

    def construct(self, gradients, factor, *scalars):
        done = ()
        updated = ()
        for (a, b), kind in zip(self.bounds, self.kinds_of_groups):
            rate, decay = scalars[2 * kind], scalars[2 * kind + 1]
            if a > 0:
                rate = ops.depend(rate, updated)  # see AdamW
            update = ops.partial(_lion, self.put, self.betas[0], self.betas[1], rate, decay)
            group = self.scaled(gradients[a:b], factor)
            updated = self.map(update, self.parameters[a:b], self.lion_m[a:b], group, self.decayed[a:b])
            done = done + updated
        return done


@_factored.register(
    "Function", "Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Bool"
)
def _factored_one(put, add_up, fades, rate, decay, parameter, row, column, gradient, decayed):  # noqa: PLR0913
    gradient = gradient.astype(ms.float32)
    matrix = gradient
    if gradient.ndim > 2:
        matrix = gradient.reshape(gradient.shape[0], -1)
    square = ops.square(matrix) + LEAST_SQUARE
    if gradient.ndim > 1:
        height, width = matrix.shape
        rows = row * fades + square.sum(1) * ((1 - fades) / width)
        columns = column * fades + square.sum(0) * ((1 - fades) / height)
        spread = ops.rsqrt(rows * (height / rows.sum())).reshape(-1, 1) * ops.rsqrt(columns).reshape(1, -1)
        kept = put(row, rows), put(column, columns)
    else:
        rows = row * fades + square * (1 - fades)
        spread = ops.rsqrt(rows)
        kept = (put(row, rows),)
    update = spread * matrix
    size = ops.sqrt(add_up(ops.square(update)) / update.size)  # CANN's ReduceMean is one of its old kernels
    update = update / ops.maximum(size, Tensor(1.0, ms.float32))
    left = parameter
    if decayed:
        left = parameter * (1 - decay)
    return put(parameter, ops.depend(left - rate * update.reshape(parameter.shape), kept))


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4) without first moment, at the rate that
    is given: what it keeps of a matrix is a value for each row and each column.

    The second moments fade by 1 - t^-0.8, updates are clipped to a root mean square of 1, the decay is
    decoupled: transformers' Adafactor with scale_parameter and relative_step off, as diffusers' scripts use
    it. A kernel of a convolution counts as a matrix, one row for each output channel; there transformers
    keeps two thirds of its size.
    """

    NAMES = ("adafactor_row.", "adafactor_column.")

    def __init__(self, *arguments, **more) -> None:
        super().__init__(*arguments, **more)
        self.put, self.add_up = in_place(), sum_of_all()

    def new_arrays(self) -> dict:
        """Of a matrix a value a row and one a column; of a vector a value each, and one that is not used."""
        rows, columns = [], []
        for p in self.parameters:
            columns.append((p.size // p.shape[0],) if p.ndim > 1 else (1,))
            rows.append((p.shape[0],))
        shapes = dict(zip(self.NAMES, (rows, columns)))
        return {
            name: [
                Parameter(ms.Tensor(np.zeros(shape, np.float32)), name=f"{name}{p.name}")
                for p, shape in zip(self.parameters, shapes[name])
            ]
            for name in self.NAMES
        }

    def scalars(self, step: int, learning_rate: float) -> list:
        """How much the second moments keep; rate and decay of each kind of parameter."""
        found = [1 - step**-0.8]
        for rate in self.rates(learning_rate):
            found += [rate, rate * self.weight_decay]
        return [Tensor(value, ms.float32) for value in found]

    def construct(self, gradients, factor, *scalars):
        done = ()
        updated = ()
        for (a, b), kind in zip(self.bounds, self.kinds_of_groups):
            rate, decay = scalars[2 * kind + 1], scalars[2 * kind + 2]
            if a > 0:
                rate = ops.depend(rate, updated)  # see AdamW
            update = ops.partial(_factored, self.put, self.add_up, scalars[0], rate, decay)
            group = self.scaled(gradients[a:b], factor)
            updated = self.map(
                update, self.parameters[a:b], self.adafactor_row[a:b], self.adafactor_column[a:b], group,
                self.decayed[a:b],
            )  # fmt: skip
            done = done + updated
        return done


@_prodigy_sums.register(
    "Function",
    "Function",
    "Number",
    "Number",
    "Tensor",
    "Tensor",
    "Tensor",
    "Tensor",
    "Tensor",
    "Tensor",
    "Tensor",
    "Tensor",
)
def _prodigy_sums_one(  # noqa: PLR0913
    put, add_up, beta1, beta2, distance, rate, parameter, moment1, moment2, total, start, gradient
):
    """Moments of gradients times the distance; and what that is estimated from: <g, x_0 - x>, |s|_1."""
    gradient = gradient.astype(ms.float32)
    along = add_up(gradient * (start - parameter))
    scaled = gradient * distance
    m = beta1 * moment1 + (1 - beta1) * scaled
    v = beta2 * moment2 + (1 - beta2) * ops.square(scaled)
    s = math.sqrt(beta2) * total + (distance / FIRST_DISTANCE * rate) * gradient
    kept = put(moment1, m), put(moment2, v), put(total, s)
    return ops.depend(ops.stack((along, add_up(ops.abs(s)))), kept)


@_prodigy_step.register("Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Bool")
def _prodigy_step_one(put, rate, decay, epsilon, parameter, moment1, moment2, decayed):  # noqa: PLR0913
    left = parameter
    if decayed:
        left = parameter * (1 - decay)
    return put(parameter, left - rate * moment1 / (ops.sqrt(moment2) + epsilon))


class Prodigy(Optimizer):
    """Prodigy (Mishchenko & Defazio 2024, arXiv 2306.06101, algorithm 4): Adam whose rate is an estimate of
    how far the solution is from the start, which grows as the training goes; with decoupled weight decay.

    The rate that is given is a factor, 1. As prodigyopt computes it; beta_3 is the root of beta_2, without
    bias correction.

    Attributes:
        distance: (2,) the estimate d, the largest so far, and the numerator of the next.
    """

    NAMES = ("prodigy_m.", "prodigy_v.", "prodigy_s.", "prodigy_start.")

    def __init__(self, *arguments, distance: Parameter | None = None, **more) -> None:
        super().__init__(*arguments, **more)
        first = Tensor(np.array([FIRST_DISTANCE, 0], np.float32))
        self.distance = Parameter(first, name="prodigy_distance") if distance is None else distance
        self.put, self.add_up = in_place(), sum_of_all()

    def part(self, places: Sequence[int]) -> "Prodigy":
        return super().part(places, distance=self.distance)

    def counters(self) -> dict:
        return {"prodigy_distance": self.distance.asnumpy().tolist()}

    def restore_counters(self, counters: Mapping) -> None:
        self.distance.set_data(Tensor(np.array(counters["prodigy_distance"], np.float32)))

    def new_arrays(self) -> dict:
        """Zeros, and a copy of the weights as they are now."""
        arrays = {name: zeros_beside(self.parameters, name.strip(".")) for name in self.NAMES}
        for start, parameter in zip(arrays["prodigy_start."], self.parameters):
            if not parameter.has_init:  # of a model that is only compiled
                start.set_data(Tensor(parameter.asnumpy()))
        return arrays

    def scalars(self, step: int, learning_rate: float) -> list:  # noqa: ARG002 (as every optimizer)
        """The factor."""
        return [Tensor(learning_rate, ms.float32)]

    def construct(self, gradients, factor, rate):
        beta1, beta2 = self.betas
        distance, numerator = self.distance[0], self.distance[1]
        step = distance * rate
        sums = ops.partial(_prodigy_sums, self.put, self.add_up, beta1, beta2, distance, step)
        found = self.map(
            sums, self.parameters, self.prodigy_m, self.prodigy_v, self.prodigy_s, self.prodigy_start,
            self.scaled(gradients, factor),
        )  # fmt: skip
        total = ops.stack(found).sum(0)
        numerator = math.sqrt(beta2) * numerator + distance / FIRST_DISTANCE * step * total[0]
        estimate = numerator / ops.maximum(total[1], Tensor(1e-37, ms.float32))
        distance = ops.maximum(distance, estimate)
        updates = ops.partial(_prodigy_step, self.put, step, step * self.weight_decay, distance * EPSILON)
        done = self.map(updates, self.parameters, self.prodigy_m, self.prodigy_v, self.decayed)
        return done + (self.put(self.distance, ops.stack((distance, numerator))),)


def make_optimizer(options: TrainOptions, trained: Trainees, scales: bool) -> Optimizer:
    """The optimizer that a training's options name. `scales`: see Optimizer."""
    common = trained, options.betas, options.weight_decay, scales
    if options.optim in ("adamw", "adam"):
        kind = AdamW
        if has_newer_kernels():
            kind = FusedAdamW
        elif is_on_cpu() and library() is not None and all(p.dtype == ms.float32 for p in trained.parameters):
            kind = OperatorAdamW
        return kind(*common, decoupled=options.optim == "adamw")
    return {"adafactor": Adafactor, "lion": Lion, "prodigy": Prodigy}[options.optim](*common)
