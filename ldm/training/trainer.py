"""The loop around the training step: it feeds it, keeps count, and reports every update. It knows no files.

The same step in plain PyTorch, and equal to it: tests/training/test_trainer.py, torch_training.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.config import ModelConfig
from ldm.device import is_on_cpu
from ldm.memory import memory_is_low
from ldm.networks.attention import BasicTransformerBlock
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.schedule import NoiseSchedule
from ldm.training.inputs import Inputs
from ldm.training.loss import DreamBoothLoss
from ldm.training.optim import AdamW, LearningRate, LossScale, MovingAverage
from ldm.training.progress import Progress
from ldm.training.train_step import AccumulatedUpdate, TrainStep, Update
from ldm.weights.checkpoint import fill, is_finite

COUNTERS = ("global_step", "updates_applied")  # of the trainer's state
MAX_SKIPPED_IN_A_ROW = 50  # updates; a loss scale that halves 50 times has left float16's range long before
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What an update did. Losses are means over its accumulated steps; the rate is in images per second."""

    global_step: int
    total_steps: int
    epoch: int
    loss: float
    instance_loss: float
    class_loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    gradient_norm: float
    loss_scale: float
    skipped: bool

    def line(self) -> str:
        prior = f" instance {self.instance_loss:.4f} class {self.class_loss:.4f}" if self.class_loss else ""
        left = time.strftime("%H:%M:%S", time.gmtime(self.seconds_left))
        overflow = f", OVERFLOW: update skipped, loss scale now {self.loss_scale:g}" if self.skipped else ""
        return (
            f"step {self.global_step}/{self.total_steps} epoch {self.epoch} loss {self.loss:.4f}{prior} "
            f"lr {self.learning_rate:.3g}, {self.images_per_second:.2f} images/s, {left} left{overflow}"
        )


class UpdateResult(NamedTuple):
    """Mean (loss, instance loss, class loss), gradient norm, and whether an overflow skipped the update."""

    losses: np.ndarray
    gradient_norm: float
    skipped: bool


class TooManyOverflows(FloatingPointError):
    """Float16 overflowed in update after update, in all processes; the weights are still those of before."""

    weights_are_good = True


def trained_networks(model: LatentDiffusion, train_text_encoder: bool) -> list[nn.Cell]:
    return [model.unet] + ([model.cond_stage_model] if train_text_encoder else [])


class Values(NamedTuple):
    """How many the whole model has, and the networks that are trained."""

    whole: int
    trained: int


def count_values(model: LatentDiffusion, train_text_encoder: bool) -> Values:
    networks = trained_networks(model, train_text_encoder)
    trained = sum(parameter.size for network in networks for parameter in network.get_parameters())
    return Values(sum(parameter.size for parameter in model.get_parameters()), trained)


def settle_recompute(recompute: bool | None, trained_values: int, dropout: float) -> bool:
    """Whether feed-forward layers are computed twice; left open (None), on a CPU where memory is low.

    Raises:
        ValueError: it is asked for with dropout, which would drop other values the second time.
    """
    if recompute and dropout:
        raise ValueError(
            "recompute does not work with dropout: set unet dropout to 0, or leave recompute out"
        )
    if recompute is not None:
        return recompute
    is_on = is_on_cpu() and not dropout and memory_is_low(4 * trained_values)
    if is_on:
        logger.info(
            "low memory: feed-forward layers are computed twice (--recompute), for about 5% of a step's time"
        )
    return is_on


def make_trainable(model: LatentDiffusion, train_text_encoder: bool, recompute: bool) -> list[Parameter]:
    """Put the networks that are trained into training mode, freeze the others.

    Returns the trained parameters.

    They come reversed, so that MindSpore computes each weight's gradient as soon as the backward pass reaches
    its layer and can free that layer's activations: it orders kernels from a graph's outputs.

    Args:
        recompute: see settle_recompute.
    """
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    networks = trained_networks(model, train_text_encoder)
    for network in networks:
        network.set_train(True)
        for parameter in network.get_parameters():
            parameter.requires_grad = True
    if recompute:
        for _, cell in model.unet.cells_and_names():
            if isinstance(cell, BasicTransformerBlock):
                cell.recompute_feed_forward()
    return [parameter for network in networks for parameter in reversed(network.trainable_params())]


def build_trainer(
    model: LatentDiffusion, inputs: Inputs, options: TrainOptions, config: ModelConfig, ranks: Ranks = ALONE
) -> "Trainer":
    """The trainer of a model as the options say. It holds the networks that are trained, and no other."""
    parameters = make_trainable(model, options.train_text_encoder, bool(options.recompute))
    loss = DreamBoothLoss(
        model.unet,
        model.cond_stage_model if options.train_text_encoder else None,
        NoiseSchedule(config.noise_schedule),
        options.prior_loss_weight if options.with_prior_preservation else None,
    )
    return Trainer(loss, parameters, inputs, options, config.use_fp16, ranks)


class Trainer:
    """Fine-tunes `parameters` by `loss` on `inputs`.

    Args:
        parameters: in the order of `make_trainable`.
        options: of the optimizer, the loss scale, accumulation and averaging.
        use_fp16: float16 compute, which can overflow.
        ranks: the processes that train together; each takes its part of every batch.
    """

    def __init__(
        self, loss: DreamBoothLoss, parameters: list[Parameter], inputs: Inputs, options: TrainOptions,
        use_fp16: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.parameters, self.inputs, self.options, self.use_fp16, self.ranks = (
            parameters,
            inputs,
            options,
            use_fp16,
            ranks,
        )
        self.global_step = 0  # updates done
        self.updates_applied = (
            0  # without those that an overflow skipped: Adam's bias correction counts these
        )
        self.skipped_in_a_row = 0
        self.trained_values = sum(parameter.size for parameter in parameters)
        self.optimizer = AdamW(
            parameters, options.betas, options.weight_decay, decoupled=options.optim == "adamw"
        )
        self.learning_rate = LearningRate(
            options.start_learning_rate, options.end_learning_rate, options.warmup_steps, options.decay_steps
        )
        first_scale = options.init_loss_scale if use_fp16 else 1.0
        self.loss_scale = LossScale(first_scale, options.loss_scale_factor, options.scale_window)
        accumulates = options.gradient_accumulation_steps > 1
        max_grad_norm = options.max_grad_norm if options.clip_grad else None
        update = Update(self.optimizer, max_grad_norm, use_fp16, scales=use_fp16 or accumulates, ranks=ranks)
        self.step = TrainStep(loss, self.optimizer, update, accumulates)
        self.accumulated_update = AccumulatedUpdate(self.step) if accumulates else None
        self.average = MovingAverage(parameters) if options.use_ema else None

    def compile(self) -> None:
        """Compile the step's graphs without running them: into the compile cache, where that is on."""
        zero = Tensor(0.0, ms.float32)
        batch = next(self.inputs.batches(self.options.train_batch_size, 1))
        self.step.compile(*batch, *[zero] * 5)
        if self.accumulated_update:
            self.accumulated_update.compile(*[zero] * 4)

    def one_update(self) -> UpdateResult:
        """Train on the next samples."""
        size, count = self.options.train_batch_size, self.options.gradient_accumulation_steps
        scale, rate = self.loss_scale.value, self.learning_rate(self.global_step)
        inverse_scale = Tensor(1 / (scale * count), ms.float32)  # of the sum of `count` gradients
        scalars = [inverse_scale, *self.optimizer.scalars(self.updates_applied + 1, rate)]
        losses = []
        for batch in self.inputs.batches(size, count, self.global_step, self.ranks):
            *terms, applied, norm = self.step(*batch, Tensor(scale, ms.float32), *scalars)
            losses.append([float(term) for term in terms])
        if self.accumulated_update:
            applied, norm = self.accumulated_update(*scalars)
        skipped = not bool(applied)
        self._count(skipped)
        mean = self.ranks.mean(np.mean(losses, axis=0)).astype(
            np.float64
        )  # between processes it travels as float32
        return UpdateResult(mean, float(norm), skipped)

    def _count(self, skipped: bool) -> None:
        """After an update: counters, loss scale, averages."""
        self.global_step += 1
        self.updates_applied += not skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.use_fp16:
            self.loss_scale.update(skipped)
        if self.average and not skipped:
            self.average.update(self.updates_applied)

    def updates(self, progress: Progress) -> Iterator[Report]:
        """Train to the end, yielding a report after every update.

        Raises:
            FloatingPointError: a float32 loss that is not finite, after which the weights are lost; or in
                float16 too many updates skipped in a row, which leave the weights as they were.
        """
        first, total = self.global_step + 1, progress.total_updates
        start, speed, left = 0.0, 0.0, 0.0
        while self.global_step < total:
            rate = self.learning_rate(self.global_step)
            losses, norm, skipped = self.one_update()
            self._require_that_it_can_continue(losses)
            if self.global_step == first:
                start = time.perf_counter()  # compiling is not counted
            else:
                seconds = (time.perf_counter() - start) / (self.global_step - first)
                speed = progress.samples_per_update * self.inputs.samples.images_per_sample / seconds
                left = seconds * (total - self.global_step)
            epoch = progress.epoch(self.global_step)
            yield Report(
                self.global_step,
                total,
                epoch,
                *losses,
                rate,
                speed,
                left,
                norm,
                self.loss_scale.value,
                skipped,
            )

    def _require_that_it_can_continue(self, losses: np.ndarray) -> None:
        if not np.isfinite(losses).all() and not self.use_fp16:
            raise FloatingPointError(
                f"the loss is {losses[0]} at step {self.global_step}: lower start_learning_rate, or give "
                f"--clip_grad"
            )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TooManyOverflows(
                f"{self.skipped_in_a_row} updates in a row overflowed in float16, up to step "
                f"{self.global_step}: lower "
                "start_learning_rate, give --clip_grad, or set use_fp16: False in the model configuration"
            )

    def require_equal_weights(self) -> None:
        """Raises ValueError where the processes' trained weights are not the same, bit by bit."""
        self.ranks.require_equal((parameter.asnumpy() for parameter in self.parameters), "trained weights")

    def require_finite_weights(self) -> None:
        """Raises FloatingPointError where a trained weight is NaN or infinite."""
        broken = [parameter.name for parameter in self.parameters if not is_finite(parameter.asnumpy())]
        if broken:
            raise FloatingPointError(
                f"{len(broken)} weights are not finite after step {self.global_step} ({broken[0]}): "
                "lower start_learning_rate"
            )

    def weights(self) -> dict[str, Parameter]:
        """The trained weights by name."""
        return {parameter.name: parameter for parameter in self.parameters}

    def averages(self) -> dict[str, Parameter] | None:
        """With EMA the averages under the names of the weights."""
        return self.average.weights() if self.average else None

    def state(self) -> tuple[dict[str, Parameter], dict]:
        """What the next update depends on, between two updates: parameters by name, and counters as JSON
        takes them.
        """
        averages = self.average.average if self.average else ()
        parameters = [*self.parameters, *self.optimizer.moment1, *self.optimizer.moment2, *averages]
        counters = {name: getattr(self, name) for name in COUNTERS}
        if self.use_fp16:
            counters |= {"loss_scale": self.loss_scale.value, "good_updates": self.loss_scale.good_updates}
        return {parameter.name: parameter for parameter in parameters}, counters

    def restore(self, arrays: Mapping[str, np.ndarray], counters: dict, source: str) -> None:
        """Go back to a state. Raises ValueError where it is not of this configuration.

        The loss scale is taken over between float16 runs only; what it grows and shrinks by are options.
        """
        fill(self.state()[0], arrays, source)
        for name in COUNTERS:
            setattr(self, name, int(counters[name]))
        if self.use_fp16 and "loss_scale" in counters:
            self.loss_scale.value, self.loss_scale.good_updates = (
                float(counters["loss_scale"]),
                int(counters["good_updates"]),
            )
