"""One update of the weights: its graphs, and what the host does between them."""

import itertools
from collections.abc import Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ldm.device import is_dry_run
from ldm.options import TrainOptions
from ldm.ranks import Ranks
from ldm.training.loss import DreamBoothLoss
from ldm.training.masters import Masters
from ldm.training.optim import Optimizer
from ldm.training.train_step import Apply, ApplyCollected, Check, Clear, GlobalNorm, TrainStep


class Update:
    """Trains `masters` by `loss` with `optimizer`.

    Args:
        options: of clipping and accumulation.
        can_overflow: float16 compute.
        ranks: among whom gradients are averaged.
    """

    def __init__(  # noqa: PLR0913
        self, loss: DreamBoothLoss, masters: Masters, optimizer: Optimizer, options: TrainOptions,
        can_overflow: bool, ranks: Ranks,
    ) -> None:  # fmt: skip
        self.optimizer, self.is_compiled = optimizer, False
        accumulates = options.gradient_accumulation_steps > 1
        self.collects = can_overflow or accumulates
        max_grad_norm = options.max_grad_norm if options.clip_grad else None
        norm, apply = GlobalNorm(options.clip_grad), Apply(masters, optimizer, max_grad_norm)
        self.step = TrainStep(loss, masters, norm, apply, ranks, self.collects, accumulates)
        self.clear = None
        if self.collects:
            self.check = Check(self.step, norm, ranks, can_overflow)
            self.apply_collected = ApplyCollected(self.step)
            self.clear = Clear(self.step) if accumulates else None

    def compile(self, batch: tuple) -> None:
        """Compile the graphs, for batches like that one, always in this order: the compile cache numbers them
        by it.
        """
        self.is_compiled = True
        zero = Tensor(0.0, ms.float32)
        scalars = [zero, *self.optimizer.scalars(1, 0.0)]
        self.step.compile(*batch, zero, *scalars)
        if self.collects:
            self.check.compile(zero)
            self.apply_collected.compile(zero, *scalars)
            if self.clear:
                self.clear.compile()

    def __call__(
        self, batches: Iterable[tuple], scale: float, factor: float, scalars: Sequence
    ) -> tuple[np.ndarray, float, bool]:
        """Train on the batches of an update.

        Args:
            scale: of the loss; factor: of the sum of the batches' gradients.
            scalars: of the optimizer.

        Returns:
            Mean (loss, instance loss, class loss); the gradient norm; and whether the update was applied.
        """
        scalars, batches = [Tensor(factor, ms.float32), *scalars], iter(batches)
        if not self.is_compiled and ms.get_context("mode") == ms.GRAPH_MODE:
            first = next(batches)
            self.compile(first)
            batches = itertools.chain([first], batches)
        results = [self.step(*batch, Tensor(scale, ms.float32), *scalars).asnumpy() for batch in batches]
        *losses, norm = np.mean(results, axis=0, dtype=np.float64)
        if not self.collects:
            return np.array(losses), float(norm), True
        good, norm = self.check(scalars[0]).asnumpy()
        is_good = bool(good) or is_dry_run()  # in which the answer means nothing
        if is_good:
            self.apply_collected(Tensor(norm, ms.float32), *scalars)
        if self.clear:
            self.clear()
        return np.array(losses), float(norm), is_good
