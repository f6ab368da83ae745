"""The training step: one graph of loss, gradients and, without accumulation, the update.

An update averages the gradients over processes, unscales, checks, clips and applies them.
"""

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import SplitWithSize

from ldm.device import is_on_cpu
from ldm.ranks import Ranks
from ldm.training.loss import DreamBoothLoss
from ldm.training.optim import AdamW, zeros_beside

# values; hundreds of small kernels cost 30 us each to start, one Concat of all small gradients 3 ms
SMALL = 65536
_norm_part = ops.MultitypeFuncGraph("norm_part")
_scale = ops.MultitypeFuncGraph("scale")
_add_to = ops.MultitypeFuncGraph("add_to")
_clear = ops.MultitypeFuncGraph("clear")
_flat = ops.MultitypeFuncGraph("flat")
_shaped = ops.MultitypeFuncGraph("shaped")


@_norm_part.register("Tensor")
def _norm_part_one(gradient):
    """Values whose squares add up to the gradient's: the gradient itself where it is small, else its norm."""
    if gradient.size <= SMALL:
        return gradient.reshape(-1).astype(ms.float32)
    squares = ops.square(gradient.astype(ms.float32))
    if gradient.ndim > 1:  # on 29M values 17 ms, against 95 for the sum over all axes at once
        squares = ops.matmul(
            ops.ones((1, gradient.shape[0]), ms.float32), squares.reshape(gradient.shape[0], -1)
        )
    return ops.sqrt(squares.sum()).reshape(1)


@_scale.register("Tensor", "Tensor")
def _scale_one(factor, gradient):
    return gradient * factor


@_add_to.register("Tensor", "Tensor")
def _add_to_one(total, gradient):
    return ops.assign_add(total, gradient)


@_clear.register("Tensor")
def _clear_one(total):
    return ops.assign(total, ops.zeros_like(total))


@_flat.register("Tensor")
def _flat_one(gradient):
    return gradient.reshape(-1)


@_shaped.register("Tensor", "Tuple")
def _shaped_one(values, shape):
    return values.reshape(shape)


class MeanOverRanks(nn.Cell):
    """Gradients averaged over the processes of a data-parallel training.

    On a CPU an exchange costs 8 ms however small it is: there all gradients travel as one array. On Ascend
    each has an exchange of its own, which MindSpore joins (all_reduce_fusion) and overlaps with the backward
    pass.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], ranks: Ranks) -> None:
        super().__init__(auto_prefix=False)
        self.is_joined = is_on_cpu()
        self.factor = 1 / ranks.size
        self.shapes, sizes = tuple(p.shape for p in parameters), [p.size for p in parameters]
        # In two levels: MindSpore's compiler gives up on a split into hundreds of parts.
        self.sizes = tuple(tuple(sizes[start : start + 40]) for start in range(0, len(sizes), 40))
        self.sums = tuple(map(sum, self.sizes))
        self.map, self.all_reduce, self.split = ops.HyperMap(), ops.AllReduce(), SplitWithSize()
        if not self.is_joined:
            self.reduce = nn.DistributedGradReducer(parameters, mean=True, degree=ranks.size)

    def construct(self, gradients):
        if not self.is_joined:
            return self.reduce(gradients)
        total = self.all_reduce(ops.cat(self.map(_flat, gradients)) * self.factor)
        values = ()
        for part, sizes in zip(self.split(total, self.sums, 0), self.sizes):
            values = values + self.split(part, sizes, 0)
        return self.map(_shaped, values, self.shapes)


class Update(nn.Cell):
    """Average over ranks, unscale, check for overflow, clip by global norm, apply the optimizer.

    Since what is checked and clipped is the average, all ranks skip, and clip, alike.

    Args:
        ranks: among whom the gradients are averaged.
        max_grad_norm: clip to this norm, or None.
        can_overflow: float16 compute: gradients that are not finite skip the update.
        scales: whether `inverse_scale` is ever other than 1.

    Returns:
        Whether the update was applied, and the global norm of the gradients before clipping (0 without
        clipping).
    """

    def __init__(
        self, optimizer: AdamW, max_grad_norm: float | None, can_overflow: bool, scales: bool, ranks: Ranks
    ) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.averages = ranks.size > 1
        if self.averages:
            self.mean_over_ranks = MeanOverRanks(optimizer.parameters, ranks)
        self.scales = scales or max_grad_norm is not None
        self.clips, self.max_grad_norm = max_grad_norm is not None, max_grad_norm
        self.can_overflow = can_overflow
        self.map = ops.HyperMap()

    def construct(self, gradients, inverse_scale, rate, epsilon, decay):
        applied = Tensor(True)
        norm = Tensor(0.0, ms.float32)
        if self.averages:
            gradients = self.mean_over_ranks(gradients)
        if self.can_overflow:
            applied = ms.amp.all_finite(gradients)
        if self.clips:
            norm = ops.sqrt(ops.square(ops.cat(self.map(_norm_part, gradients))).sum()) * inverse_scale
            # as torch.nn.utils.clip_grad_norm_: a millionth keeps the quotient finite
            inverse_scale = inverse_scale * ops.minimum(
                self.max_grad_norm / (norm + 1e-6), Tensor(1.0, ms.float32)
            )
        if self.scales:
            gradients = self.map(ops.partial(_scale, inverse_scale), gradients)
        if self.can_overflow:
            if applied:
                self.optimizer(gradients, rate, epsilon, decay)
        else:
            self.optimizer(gradients, rate, epsilon, decay)
        return applied, norm


class TrainStep(nn.TrainOneStepCell):
    """Loss and gradients of one batch; then the update, or with accumulation their addition to the running
    sum.
    """

    def __init__(self, loss: DreamBoothLoss, optimizer: AdamW, update: Update, accumulates: bool) -> None:
        super().__init__(loss, optimizer)
        self.update = update
        self.accumulates = accumulates
        self.map = ops.HyperMap()
        self.loss_and_gradients = ops.value_and_grad(self.scaled_loss, None, self.weights, has_aux=True)
        if accumulates:
            self.sums = zeros_beside(self.weights, "gradient_sum")

    def scaled_loss(self, latents, text, t, noise, scale):
        loss, instance_loss, class_loss = self.network(latents, text, t, noise)
        return loss * scale, loss, instance_loss, class_loss

    def construct(self, latents, text, t, noise, scale, inverse_scale, rate, epsilon, decay):  # noqa: PLR0913
        (_, loss, instance_loss, class_loss), gradients = self.loss_and_gradients(
            latents, text, t, noise, scale
        )
        applied, norm = Tensor(True), Tensor(0.0, ms.float32)
        if self.accumulates:
            self.map(_add_to, self.sums, gradients)
        else:
            applied, norm = self.update(gradients, inverse_scale, rate, epsilon, decay)
        return loss, instance_loss, class_loss, applied, norm


class AccumulatedUpdate(nn.Cell):
    """The update from the sums that TrainStep collected, which are set back to zero."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__(auto_prefix=False)
        self.update, self.sums = step.update, step.sums
        self.map = ops.HyperMap()

    def construct(self, inverse_scale, rate, epsilon, decay):
        applied, norm = self.update(self.sums, inverse_scale, rate, epsilon, decay)
        self.map(_clear, self.sums)
        return applied, norm
