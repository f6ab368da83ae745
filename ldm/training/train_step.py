"""The training step: loss and gradients of one batch, and the update by them.

Where nothing can stop an update, and it has one step, all of it is one graph. Otherwise gradients are
collected: the step adds them up, `Check` looks at them, and on its word the host has them applied, or not. So
no graph has branches.
"""

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import SplitWithSize

from ldm.device import is_on_cpu
from ldm.operators import library, operator
from ldm.ranks import Ranks
from ldm.training.loss import DreamBoothLoss
from ldm.training.masters import Masters, in_place, put
from ldm.training.optim import AdamW, zeros_beside
from ldm.training.sums import sum_of_all

# values; hundreds of small kernels cost 30 us each to start, one Concat of all small gradients 3 ms
SMALL = 65536
_norm_part = ops.MultitypeFuncGraph("norm_part")
_square_sum = ops.MultitypeFuncGraph("square_sum")
_add_to = ops.MultitypeFuncGraph("add_to")
_plus = ops.MultitypeFuncGraph("plus")
_clear = ops.MultitypeFuncGraph("clear")
_flat = ops.MultitypeFuncGraph("flat")
_shaped = ops.MultitypeFuncGraph("shaped")
_mean = ops.MultitypeFuncGraph("mean")


@_norm_part.register("Function", "Tensor")
def _norm_part_one(total, gradient):
    """Values whose squares add up to the gradient's: the gradient itself where it is small, else its norm."""
    if gradient.size <= SMALL:
        return gradient.reshape(-1).astype(ms.float32)
    return ops.sqrt(total(ops.square(gradient.astype(ms.float32)))).reshape(1)


@_square_sum.register("Tensor")
def _square_sum_one(gradient):
    """On an accelerator."""
    return ops.square(gradient.astype(ms.float32)).sum().reshape(1)


@_add_to.register("Tensor", "Tensor")
def _add_to_one(total, gradient):
    return ops.assign_add(total, gradient)


@_plus.register("Function", "Tensor", "Tensor")
def _plus_one(put, total, gradient):
    return put(total, total + gradient)


@_clear.register("Function", "Tensor")
def _clear_one(put, total):
    return put(total, ops.zeros_like(total))


@_flat.register("Tensor")
def _flat_one(gradient):
    return gradient.reshape(-1)


@_shaped.register("Tensor", "Tuple")
def _shaped_one(values, shape):
    return values.reshape(shape)


@_mean.register("Function", "Number", "Tensor")
def _mean_one(all_reduce, factor, gradient):
    return all_reduce(gradient.astype(ms.float32) * factor)


class MeanOverRanks(nn.Cell):
    """Gradients averaged over the processes of a data-parallel training, float32.

    On a CPU an exchange costs 8 ms however small it is: there all gradients travel as one array. On Ascend
    each of the joined arrays has an exchange of its own, which goes on beside the backward pass.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], ranks: Ranks) -> None:
        super().__init__(auto_prefix=False)
        self.travels_as_one = is_on_cpu()
        self.factor = 1 / ranks.size
        self.shapes, sizes = tuple(p.shape for p in parameters), [p.size for p in parameters]
        # In two levels: MindSpore's compiler gives up on a split into hundreds of parts.
        self.sizes = tuple(tuple(sizes[start : start + 40]) for start in range(0, len(sizes), 40))
        self.sums = tuple(map(sum, self.sizes))
        self.map, self.all_reduce, self.split = ops.HyperMap(), ops.AllReduce(), SplitWithSize()

    def construct(self, gradients):
        if not self.travels_as_one:
            return self.map(ops.partial(_mean, self.all_reduce, self.factor), gradients)
        total = self.all_reduce(ops.cat(self.map(_flat, gradients)) * self.factor)
        values = ()
        for part, sizes in zip(self.split(total, self.sums, 0), self.sizes):
            values = values + self.split(part, sizes, 0)
        return self.map(_shaped, values, self.shapes)


class GlobalNorm(nn.Cell):
    """The norm of all gradients together, times a factor; 0 where nobody asks for it."""

    def __init__(self, is_wanted: bool) -> None:
        super().__init__(auto_prefix=False)
        self.is_wanted, self.is_on_cpu = is_wanted, is_on_cpu()
        self.map, self.total = ops.HyperMap(), sum_of_all()
        self.adds_up_at_once = self.is_on_cpu and library() is not None
        if self.adds_up_at_once:
            self.square_sum = operator("SquareSum", lambda *_: [1])

    def construct(self, gradients, factor):
        if not self.is_wanted:
            return Tensor(0.0, ms.float32)
        if self.adds_up_at_once:
            return ops.sqrt(self.square_sum(*gradients)).reshape(()) * factor
        if self.is_on_cpu:
            parts = ops.cat(self.map(ops.partial(_norm_part, self.total), gradients))
            return ops.sqrt(self.total(ops.square(parts))) * factor
        return ops.sqrt(ops.cat(self.map(_square_sum, gradients)).sum()) * factor


class Apply(nn.Cell):
    """Clip by the global norm, unscale, let the optimizer train the masters, and the networks follow them.

    Args:
        max_grad_norm: clip to this norm, or None.
    """

    def __init__(self, masters: Masters, optimizer: AdamW, max_grad_norm: float | None) -> None:
        super().__init__(auto_prefix=False)
        self.masters, self.optimizer = masters, optimizer
        self.clips, self.max_grad_norm = max_grad_norm is not None, max_grad_norm
        self.has_copies = masters.joins

    def construct(self, gradients, norm, factor, *scalars):
        if self.clips:
            # as torch.nn.utils.clip_grad_norm_: a millionth keeps the quotient finite
            factor = factor * ops.minimum(self.max_grad_norm / (norm + 1e-6), Tensor(1.0, ms.float32))
        updated = self.optimizer(gradients, factor, *scalars)
        if self.has_copies:
            return ops.depend(norm, (updated, self.masters()))
        return ops.depend(norm, updated)


class TrainStep(nn.TrainOneStepCell):
    """Loss and gradients of one batch; then the update, or, where gradients are collected, their addition to
    the running sums.

    Args:
        ranks: among whom gradients are averaged: here, or with several steps an update in `Check`.
        collects: see the module; `accumulates`: with several steps an update.

    Returns:
        float32 (4,), of which the host waits for all at once: loss, its instance and class term, and the
        global norm of the gradients before clipping (0 without clipping, or where they are collected).
    """

    def __init__(  # noqa: PLR0913
        self, loss: DreamBoothLoss, masters: Masters, norm: GlobalNorm, apply: Apply, ranks: Ranks,
        collects: bool, accumulates: bool,
    ) -> None:  # fmt: skip
        super().__init__(loss, apply.optimizer)
        self.masters, self.norm, self.apply_update = masters, norm, apply
        self.collects, self.accumulates = collects, accumulates
        self.size = 5 if loss.is_weighed else 4  # tensors of a batch
        self.map, self.put = ops.HyperMap(), in_place()
        # CANN has assign_add among its old kernels only; on a CPU it takes no memory beside the sum
        self.adds_in_place = is_on_cpu()
        self.averages = ranks.size > 1 and not accumulates
        if self.averages:
            self.mean_over_ranks = MeanOverRanks(masters.trained, ranks)
        self.weights = masters.own
        self.loss_and_gradients = ops.value_and_grad(self.scaled_loss, None, self.weights, has_aux=True)
        if collects:
            is_summed = accumulates or ranks.size > 1
            dtypes = [ms.float32] * len(masters.trained) if is_summed else masters.gradient_dtypes
            self.sums = zeros_beside(masters.trained, "gradient_sum", dtypes)

    def scaled_loss(self, scale, *batch):
        loss, instance_loss, class_loss = self.network(*batch)
        return loss * scale, loss, instance_loss, class_loss

    def add_to_sums(self, gradients):
        if self.adds_in_place:
            return self.map(_add_to, self.sums, gradients)
        return self.map(ops.partial(_plus, self.put), self.sums, gradients)

    def construct(self, *inputs):
        """A batch, the loss scale, the factor of the gradients, and the optimizer's scalars."""
        batch, scale, factor = inputs[: self.size], inputs[self.size], inputs[self.size + 1]
        scalars = inputs[self.size + 2 :]
        (_, loss, instance_loss, class_loss), gradients = self.loss_and_gradients(scale, *batch)
        gradients = self.masters.join(gradients)
        if self.averages:
            gradients = self.mean_over_ranks(gradients)
        norm = Tensor(0.0, ms.float32)
        if self.accumulates:
            norm = ops.depend(norm, self.add_to_sums(gradients))
        elif self.collects:
            norm = ops.depend(norm, self.map(ops.partial(put, self.put), self.sums, gradients))
        else:
            norm = self.norm(gradients, factor)
            norm = self.apply_update(gradients, norm, factor, *scalars)
        return ops.stack((loss, instance_loss, class_loss, norm))


class Check(nn.Cell):
    """What the host must know of collected gradients before they are applied.

    Processes agree on it: the first Ascend 910 asks a register of its own device for an overflow, not the
    gradients, and they saturate instead of becoming infinite, so that no exchange of them carries it on.

    Args:
        step: which collects them.
        ranks: among whom the sums of several steps are averaged first.
        can_overflow: float16 compute: gradients that are not finite must not be applied.

    Returns:
        float32 (2,): 1 where they can be applied, else 0; and the global norm (0 without clipping).
    """

    def __init__(self, step: TrainStep, norm: GlobalNorm, ranks: Ranks, can_overflow: bool) -> None:
        super().__init__(auto_prefix=False)
        self.sums, self.norm, self.can_overflow = step.sums, norm, can_overflow
        self.averages, self.is_shared = ranks.size > 1 and step.accumulates, ranks.size > 1
        self.map, self.put = ops.HyperMap(), in_place()
        if self.averages:
            self.mean_over_ranks = MeanOverRanks(self.sums, ranks)
        if self.is_shared:
            self.all_reduce = ops.AllReduce()

    def construct(self, factor):
        gradients, good = self.sums, Tensor(1.0, ms.float32)
        if self.averages:
            gradients = self.mean_over_ranks(gradients)
            good = ops.depend(good, self.map(ops.partial(put, self.put), self.sums, gradients))
        if self.can_overflow:
            good = good * ms.amp.all_finite(gradients).astype(ms.float32)
            if self.is_shared:
                bad = self.all_reduce((1.0 - good).reshape(1)).reshape(())
                good = (bad == 0).astype(ms.float32)
        return ops.stack((good, self.norm(gradients, factor)))


class ApplyCollected(nn.Cell):
    """The update from the sums that TrainStep collected."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__(auto_prefix=False)
        self.apply_update, self.sums = step.apply_update, step.sums

    def construct(self, norm, factor, *scalars):
        return self.apply_update(self.sums, norm, factor, *scalars)


class Clear(nn.Cell):
    """Sets the sums back to zero."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__(auto_prefix=False)
        self.sums, self.map, self.put = step.sums, ops.HyperMap(), in_place()

    def construct(self):
        return self.map(ops.partial(_clear, self.put), self.sums)
