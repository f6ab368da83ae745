"""Adam and AdamW, and the moving average of the weights. Others: ldm/training/other_optimizers.py."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops.auto_generate import AdamW as FusedKernel

from ldm.operators import operator
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


def split_where_changed(bounds: Sequence[tuple[int, int]], kinds: Sequence) -> tuple[tuple[int, int], ...]:
    """Runs (first, end) cut further, so that all that is in one is of one kind."""
    cuts = [place for place in range(1, len(kinds)) if kinds[place] != kinds[place - 1]]
    pieces = []
    for first, end in bounds:
        inner = [first, *(cut for cut in cuts if first < cut < end), end]
        pieces += zip(inner, inner[1:])
    return tuple(pieces)


@dataclass(frozen=True)
class Trainees:
    """What an optimizer trains.

    Attributes:
        parameters: in the order in which the backward pass comes by.
        decayed: which of them have weight decay.
        kinds: of each one, a number: a graph knows these, not the rates.
        ratios: of each kind's learning rate to the run's.
    """

    parameters: Sequence[Parameter]
    decayed: Sequence[bool]
    kinds: Sequence[int]
    ratios: Sequence[float] = (1.0,)

    @classmethod
    def alike(cls, parameters: Sequence[Parameter], decayed: Sequence[bool]) -> "Trainees":
        """All at the run's rate."""
        return cls(parameters, decayed, [0] * len(parameters))

    def part(self, places: Sequence[int]) -> "Trainees":
        """Some of them."""
        columns = self.parameters, self.decayed, self.kinds
        return Trainees(*([column[place] for place in places] for column in columns), self.ratios)


class Optimizer(nn.Cell):
    """What AdamW and the others have in common.

    The parameters are updated in groups, one after the other: where nothing else needs all gradients at once,
    a group's gradients are used up before the next group's are computed, and never are all of them in memory.

    Args:
        scales: whether gradients are multiplied by a factor first.
        state: arrays to go on with, as `arrays` has them; None: new ones.

    Attributes:
        arrays: what is kept for every parameter from update to update, by the prefix of its names in a state.
    """

    NAMES: tuple[str, ...] = ()

    def __init__(
        self, trained: Trainees, betas: tuple[float, float], weight_decay: float, scales: bool,
        state: Mapping[str, Sequence[Parameter]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.trained, self.parameters = trained, ParameterTuple(trained.parameters)
        self.betas, self.weight_decay, self.scales = betas, weight_decay, scales
        self.decayed = tuple(weight_decay > 0 and its for its in trained.decayed)
        self.kinds, self.ratios = tuple(trained.kinds), tuple(trained.ratios)
        bounds = equal_groups([p.size for p in trained.parameters], GROUPS)
        self.bounds = split_where_changed(bounds, self.kinds)
        self.kinds_of_groups = tuple(self.kinds[first] for first, _ in self.bounds)
        self.map = ops.HyperMap()
        for name, values in (state or self.new_arrays()).items():
            setattr(self, name.strip("."), ParameterTuple(values))

    def new_arrays(self) -> dict[str, Sequence[Parameter]]:
        """The state at the beginning."""
        return {name: zeros_beside(self.parameters, name.strip(".")) for name in self.NAMES}

    @property
    def arrays(self) -> dict[str, ParameterTuple]:
        return {name: getattr(self, name.strip(".")) for name in self.NAMES}

    def part(self, places: Sequence[int], **more) -> "Optimizer":
        """The same for some of the parameters, with what is kept of them; `more` is for the subclass."""
        state = {name: [values[place] for place in places] for name, values in self.arrays.items()}
        return type(self)(
            self.trained.part(places), self.betas, self.weight_decay, self.scales, state=state, **more
        )

    def counters(self) -> dict:
        """What else the next update depends on, as JSON takes it."""
        return {}

    def restore_counters(self, counters: Mapping) -> None:
        """Go back to what `counters` gave."""

    def rates(self, learning_rate: float) -> list[float]:
        """Of each kind of parameter."""
        return [learning_rate * ratio for ratio in self.ratios]

    def scaled(self, gradients, factor):
        if self.scales:
            return self.map(ops.partial(_scale, factor), gradients)
        return gradients


class AdamW(Optimizer):
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), or with L2 decay
    ("adam").

    Two kernels, `p -= (rate * weight_decay) p` and Adam, take 46 ms for 50M values on 2 cores with AVX-512,
    where the fused AdamWeightDecay takes 154. Adam's scalars are inputs, so the bias correction rides in
    them: with c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t), (m / c1) / (sqrt(v) / c2 + eps) is c2 / c1 * m /
    (sqrt(v) + eps c2).

    Args:
        decoupled: True for AdamW, False for Adam with the decay added to the gradient.
    """

    NAMES = ("adam_m.", "adam_v.")

    def __init__(self, *arguments, decoupled: bool = True, **more) -> None:
        super().__init__(*arguments, **more)
        self.decoupled = decoupled
        self.l2 = 0.0 if decoupled else self.weight_decay
        self.kernel, self.shrink = ops.Adam(), ops.ApplyGradientDescent()

    def part(self, places: Sequence[int]) -> "AdamW":
        return super().part(places, decoupled=self.decoupled)

    def scalars(self, step: int, learning_rate: float) -> list:
        """The kernel's rate, epsilon and decay for update `step` (from 1), of each kind of parameter."""
        c1, c2 = 1 - self.betas[0] ** step, math.sqrt(1 - self.betas[1] ** step)
        found = []
        for rate in self.rates(learning_rate):
            decay = rate * self.weight_decay if self.decoupled else 0.0
            found += [Tensor(value, ms.float32) for value in (rate * c2 / c1, EPSILON * c2, decay)]
        return found

    def construct(self, gradients, factor, *scalars):
        done = ()
        updated = ()
        for group in range(len(self.bounds)):
            (a, b), kind = self.bounds[group], self.kinds_of_groups[group]
            rate, epsilon, decay = scalars[3 * kind], scalars[3 * kind + 1], scalars[3 * kind + 2]
            if a > 0:
                # MindSpore orders kernels backwards from the outputs: what the next group's rate waits for
                # comes before its gradients
                rate = ops.depend(rate, updated)
            updated = self.update_group(group, gradients[a:b], factor, rate, epsilon, decay)
            done = done + updated
        return done

    def update_group(self, group, gradients, factor, rate, epsilon, decay):  # noqa: PLR0913
        """Train one of the groups; a tuple that is there when it is done."""
        a, b = self.bounds[group]
        update = ops.partial(
            _adam, self.kernel, self.shrink, self.betas[0], self.betas[1], rate, epsilon, decay, self.l2
        )
        return self.map(
            update, self.parameters[a:b], self.adam_m[a:b], self.adam_v[a:b],
            self.scaled(gradients, factor), self.decayed[a:b],
        )  # fmt: skip


class OperatorAdamW(AdamW):
    """The same by this project's operator, one for each group of parameters."""

    def __init__(self, *arguments, **more) -> None:
        super().__init__(*arguments, **more)
        self.updates, self.options = (), ()
        for group, (first, end) in enumerate(self.bounds):
            count = end - first
            writes = (True,) * (3 * count) + (False,) * (count + 5)
            self.updates += (operator("AdamW", lambda *_: [1], kind=(group,), writes=writes),)
            values = (*self.betas, self.l2, *self.decayed[first:end])
            self.options += (Tensor(np.array(values, np.float32)),)

    def update_group(self, group, gradients, factor, rate, epsilon, decay):  # noqa: PLR0913
        a, b = self.bounds[group]
        updated = self.updates[group](
            *self.parameters[a:b], *self.adam_m[a:b], *self.adam_v[a:b], *gradients,
            factor, rate, epsilon, decay, self.options[group],
        )  # fmt: skip
        return (updated,)


class FusedAdamW(AdamW):
    """The same by CANN's AdamW, one kernel a parameter: for an Ascend, where there are few, joined ones."""

    def __init__(self, *arguments, **more) -> None:
        super().__init__(*arguments, **more)
        self.kernel = FusedKernel()
        self.shrinks = tuple(self.weight_decay if its and self.decoupled else 0.0 for its in self.decayed)

    def scalars(self, step: int, learning_rate: float) -> list:
        """The kernel's step, and its rate for each kind of parameter."""
        return [Tensor(step, ms.float32), *(ms.mutable(float(rate)) for rate in self.rates(learning_rate))]

    def construct(self, gradients, factor, step, *rates):
        done = ()
        for place in range(len(self.parameters)):
            parameter, m, v = self.parameters[place], self.adam_m[place], self.adam_v[place]
            rate = rates[self.kinds[place]]
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
