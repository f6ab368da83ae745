"""Adam and AdamW, the learning-rate schedule, the dynamic loss scale, the moving average of the weights."""

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops.auto_generate import AdamW as FusedKernel

from ldm.training.masters import in_place

EPSILON = 1e-8
GROUPS = 24
# Loops over hundreds of parameters are written as maps: MindSpore unrolls a `for` into nested calls, and
# their depth is limited.
_adam = ops.MultitypeFuncGraph("adam")
_blend = ops.MultitypeFuncGraph("blend")
_scale = ops.MultitypeFuncGraph("scale")


@_adam.register(
    "Function",
    "Function",
    "Number",
    "Number",
    "Tensor",
    "Tensor",
    "Tensor",
    "Number",
    "Tensor",
    "Tensor",
    "Tensor",
    "Tensor",
    "Bool",
)
def _adam_one(  # noqa: PLR0913 (called by MindSpore)
    kernel, shrink, beta1, beta2, rate, epsilon, decay, l2, parameter, moment1, moment2, gradient, decayed
):
    gradient = gradient.astype(ms.float32)
    if decayed:
        if l2 > 0:
            gradient = gradient + l2 * parameter
        else:
            gradient = ops.depend(gradient, shrink(parameter, decay, parameter))
    # beta powers are 0: Adam's bias correction is already in `rate` and `epsilon` (see `scalars`)
    return kernel(parameter, moment1, moment2, 0.0, 0.0, rate, beta1, beta2, epsilon, gradient)[0]


@_scale.register("Tensor", "Tensor")
def _scale_one(factor, gradient):
    return gradient * factor


@_blend.register("Function", "Tensor", "Tensor", "Tensor", "Tensor")
def _blend_one(put, decay, rest, average, source):
    return put(average, average * decay + source * rest)


def zeros_beside(
    parameters: Sequence[Parameter], prefix: str, dtypes: Sequence | None = None
) -> ParameterTuple:
    """A parameter of zeros for each of `parameters`, named after it; of its dtype, or one that is given."""
    # clone() would first draw initial values for a parameter that a checkpoint has filled, and keep them: a
    # copy of the weights.
    dtypes = dtypes or [p.dtype for p in parameters]
    return ParameterTuple([
        Parameter(initializer("zeros", p.shape, dtype), name=f"{prefix}.{p.name}")
        for p, dtype in zip(parameters, dtypes)
    ])  # fmt: skip


def equal_groups(sizes: Sequence[int], count: int) -> tuple[tuple[int, int], ...]:
    """Cut a sequence into at most `count` runs (first, end) of about equal sums; none is empty."""
    reached = np.cumsum(sizes) * count / sum(sizes)  # in groups
    starts = [0, *(int(index) for index in np.searchsorted(reached, np.arange(1, count)))]
    return tuple((first, end) for first, end in zip(starts, [*starts[1:], len(sizes)]) if first < end)


class AdamW(nn.Cell):
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), or with L2 decay
    ("adam").

    Two kernels, `p -= (rate * weight_decay) p` and Adam, take 46 ms for 50M values on 2 cores with AVX-512,
    where the fused AdamWeightDecay takes 154. Adam's scalars are inputs, so the bias correction rides in
    them: with c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t), (m / c1) / (sqrt(v) / c2 + eps) is c2 / c1 * m /
    (sqrt(v) + eps c2).

    The parameters are updated in groups, one after the other: where nothing else needs all gradients at once,
    a group's gradients are used up before the next group's are computed, and never are all of them in memory.

    Args:
        parameters: what to train, in the order in which the backward pass comes by.
        decayed: which of them have weight decay.
        decoupled: True for AdamW, False for Adam with the decay added to the gradient.
        scales: whether gradients are multiplied by a factor first.
    """

    def __init__(
        self, parameters: Sequence[Parameter], decayed: Sequence[bool], betas: tuple[float, float],
        weight_decay: float, decoupled: bool, scales: bool,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.moment1, self.moment2 = zeros_beside(parameters, "adam_m"), zeros_beside(parameters, "adam_v")
        self.bounds = equal_groups([p.size for p in parameters], GROUPS)
        self.betas, self.decoupled, self.scales = betas, decoupled, scales
        self.weight_decay = weight_decay
        self.decayed = tuple(weight_decay > 0 and its for its in decayed)
        self.l2 = 0.0 if decoupled else weight_decay
        self.kernel, self.shrink = ops.Adam(), ops.ApplyGradientDescent()
        self.map = ops.HyperMap()

    def scalars(self, step: int, learning_rate: float) -> list:
        """The kernel's rate, epsilon and decay for update number `step` (from 1)."""
        c1, c2 = 1 - self.betas[0] ** step, math.sqrt(1 - self.betas[1] ** step)
        decay = learning_rate * self.weight_decay if self.decoupled else 0.0
        return [Tensor(value, ms.float32) for value in (learning_rate * c2 / c1, EPSILON * c2, decay)]

    def construct(self, gradients, factor, rate, epsilon, decay):
        done = ()
        for a, b in self.bounds:
            group = gradients[a:b]
            if self.scales:
                group = self.map(ops.partial(_scale, factor), group)
            update = ops.partial(
                _adam, self.kernel, self.shrink, self.betas[0], self.betas[1], rate, epsilon, decay, self.l2
            )
            updated = self.map(
                update, self.parameters[a:b], self.moment1[a:b], self.moment2[a:b], group, self.decayed[a:b]
            )
            # MindSpore orders kernels backwards from the outputs: what the next group's rate waits for comes
            # before its gradients
            rate = ops.depend(rate, updated)
            done = done + updated
        return done


class FusedAdamW(AdamW):
    """The same by CANN's AdamW, one kernel a parameter: for an Ascend, where there are few, joined ones."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.kernel = FusedKernel()
        self.shrinks = tuple(self.weight_decay if its and self.decoupled else 0.0 for its in self.decayed)

    def scalars(self, step: int, learning_rate: float) -> list:
        """The kernel's step and rate."""
        return [Tensor(step, ms.float32), ms.mutable(float(learning_rate))]

    def construct(self, gradients, factor, step, rate):
        done = ()
        for place in range(len(self.parameters)):
            parameter, m, v = self.parameters[place], self.moment1[place], self.moment2[place]
            # one after the other: the float32 form of a gradient is as long as it is needed
            gradient = ops.depend(gradients[place], done).astype(ms.float32)
            if self.scales:
                gradient = gradient * factor
            if self.l2 > 0 and self.decayed[place]:
                gradient = gradient + self.l2 * parameter
            beta1, beta2 = self.betas
            shrink = self.shrinks[place]
            updated = self.kernel(parameter, m, v, v, gradient, step, rate, beta1, beta2, shrink, EPSILON)
            done = done + (updated[0],)
        return done


class LearningRate:
    """Constant, with a linear warm-up and a cosine decay where asked.

    Call with the number of updates done.
    """

    def __init__(
        self, start: float, end: float | None = None, warmup_steps: int = 0, decay_steps: int = 0
    ) -> None:
        self.start, self.end = start, end or 0.0
        self.warmup_steps, self.decay_steps = warmup_steps, decay_steps

    def __call__(self, global_step: int) -> float:
        if global_step < self.warmup_steps:
            return self.start * (global_step + 1) / self.warmup_steps
        if not self.decay_steps:
            return self.start
        done = min(1.0, (global_step - self.warmup_steps) / self.decay_steps)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))


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


class MovingAverage(nn.Cell):
    """Exponential moving average of parameters, decay 0.9999, warmed up as (1 + n) / (10 + n)."""

    def __init__(self, parameters: Sequence[Parameter], decay: float = 0.9999) -> None:
        super().__init__(auto_prefix=False)
        self.limit = decay
        self.source = ParameterTuple(parameters)
        self.average = zeros_beside(parameters, "ema")
        for average, source in zip(self.average, self.source):
            average.set_data(Tensor(source.asnumpy()))
        self.map, self.put = ops.HyperMap(), in_place()

    def construct(self, decay, rest):
        return self.map(ops.partial(_blend, self.put, decay, rest), self.average, self.source)

    def update(self, updates: int) -> None:
        decay = min(self.limit, (1 + updates) / (10 + updates))
        self(Tensor(np.float32(decay)), Tensor(np.float32(1 - decay)))
