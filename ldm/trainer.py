"""The training step and the loop around it.

`TrainStep` is one graph: loss, gradients and, without accumulation, the update. `Trainer` feeds it, keeps count, and
writes checkpoints; it shows nothing itself but reports every update to its caller.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm import runtime
from ldm.checkpoint import save_weights, spill, weights_of
from ldm.config import ModelConfig
from ldm.data import Draw, DreamBoothData
from ldm.latent_cache import Moments
from ldm.loss import DreamBoothLoss
from ldm.models.attention import BasicTransformerBlock
from ldm.models.autoencoder import posterior_sample
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.optim import AdamW, LearningRate, LossScale, MovingAverage, zeros_beside
from ldm.options import TrainOptions
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_square_sum = ops.MultitypeFuncGraph("square_sum")
_scale = ops.MultitypeFuncGraph("scale")
_add_to = ops.MultitypeFuncGraph("add_to")
_clear = ops.MultitypeFuncGraph("clear")


@_square_sum.register("Tensor")
def _square_sum_one(gradient):
    squares = ops.square(gradient.astype(ms.float32))
    if gradient.ndim > 1:  # on 29M values 17 ms, against 95 for the sum over all axes at once
        squares = ops.matmul(ops.ones((1, gradient.shape[0]), ms.float32), squares.reshape(gradient.shape[0], -1))
    return squares.sum()


@_scale.register("Tensor", "Tensor")
def _scale_one(factor, gradient):
    return gradient * factor


@_add_to.register("Tensor", "Tensor")
def _add_to_one(total, gradient):
    return ops.assign_add(total, gradient)


@_clear.register("Tensor")
def _clear_one(total):
    return ops.assign(total, ops.zeros_like(total))


class Update(nn.Cell):
    """Unscale, check for overflow, clip by global norm, apply the optimizer.

    Args:
        max_grad_norm: clip to this norm, or None.
        can_overflow: float16 compute: gradients that are not finite skip the update.
        scales: whether `inverse_scale` is ever other than 1.

    Returns:
        Whether the update was applied, and the global norm of the gradients before clipping (0 without clipping).
    """

    def __init__(self, optimizer: AdamW, max_grad_norm: float | None, can_overflow: bool, scales: bool) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.scales = scales or max_grad_norm is not None
        self.clips, self.max_grad_norm = max_grad_norm is not None, max_grad_norm
        self.can_overflow = can_overflow
        self.map = ops.HyperMap()

    def construct(self, gradients, inverse_scale, rate, epsilon, decay):
        applied = Tensor(True)
        norm = Tensor(0.0, ms.float32)
        if self.can_overflow:
            applied = ms.amp.all_finite(gradients)
        if self.clips:
            squares = self.map(_square_sum, gradients)
            norm = ops.sqrt(ops.stack(squares).sum()) * inverse_scale
            # as torch.nn.utils.clip_grad_norm_: a millionth keeps the quotient finite
            inverse_scale = inverse_scale * ops.minimum(self.max_grad_norm / (norm + 1e-6), Tensor(1.0, ms.float32))
        if self.scales:
            gradients = self.map(ops.partial(_scale, inverse_scale), gradients)
        if self.can_overflow:
            if applied:
                self.optimizer(gradients, rate, epsilon, decay)
        else:
            self.optimizer(gradients, rate, epsilon, decay)
        return applied, norm


class TrainStep(nn.TrainOneStepCell):
    """Loss and gradients of one batch; then the update, or with accumulation their addition to the running sum."""

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
        return loss * scale, instance_loss, class_loss

    def construct(self, latents, text, t, noise, scale, inverse_scale, rate, epsilon, decay):
        (loss, instance_loss, class_loss), gradients = self.loss_and_gradients(latents, text, t, noise, scale)
        applied, norm = Tensor(True), Tensor(0.0, ms.float32)
        if self.accumulates:
            self.map(_add_to, self.sums, gradients)
        else:
            applied, norm = self.update(gradients, inverse_scale, rate, epsilon, decay)
        return loss * inverse_scale, instance_loss, class_loss, applied, norm


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


@dataclass(frozen=True)
class Report:
    """What an update did. Losses are means over its accumulated batches; the rate is in pictures a second."""

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


def trained_networks(model: LatentDiffusion, options: TrainOptions) -> list[nn.Cell]:
    return [model.unet] + ([model.cond_stage_model] if options.train_text_encoder else [])


def settle_recompute(options: TrainOptions, model: LatentDiffusion, config: ModelConfig) -> TrainOptions:
    """The options with `recompute` decided where it was left open: on a CPU by the memory there is, else no."""
    if options.recompute is not None:
        return options
    trained = sum(p.size for network in trained_networks(model, options) for p in network.get_parameters())
    on_cpu = ms.get_context("device_target") == "CPU"
    short = on_cpu and not config.unet.dropout and runtime.memory_is_short(4 * trained)
    if short:
        logger.info("memory is short: feed-forward layers are computed a second time in the backward pass, for about 5% of a step")
    return dataclasses.replace(options, recompute=short)


def total_updates(options: TrainOptions, data: DreamBoothData) -> int:
    """The updates of a whole run; the last one is filled up with samples of one epoch more."""
    return math.ceil(options.epochs * data.samples_per_epoch / options.samples_per_update)


class Trainer:
    """Fine-tunes UNet and, where asked, text encoder on DreamBoothData. The VAE is always frozen.

    Args:
        moments: what the VAE makes of the drawn pictures, see ldm/latent_cache.py.
    """

    def __init__(self, model: LatentDiffusion, config: ModelConfig, options: TrainOptions, data: DreamBoothData, moments: Moments) -> None:
        self.model, self.config, self.options, self.data, self.moments = model, config, options, data, moments
        self.schedule = NoiseSchedule(config.noise_schedule)
        self.released: dict[str, np.ndarray] = {}
        self.global_step = 0
        self.updates_applied = 0  # without those that an overflow skipped: Adam's bias correction counts these
        self.samples_per_update = options.samples_per_update
        self.total_steps = total_updates(options, data)

        trained = trained_networks(model, options)
        for parameter in model.get_parameters():
            parameter.requires_grad = False
        for network in trained:
            network.set_train(True)
            for parameter in network.get_parameters():
                parameter.requires_grad = True
        if options.recompute:
            if config.unet.dropout:
                raise ValueError("recompute with dropout: a second dropout would draw anew; set unet dropout to 0 or leave recompute out")
            for _, cell in model.unet.cells_and_names():
                if isinstance(cell, BasicTransformerBlock):
                    cell.recompute_feed_forward()
        # Backwards through the networks: MindSpore orders its kernels from a graph's outputs, so that the gradient of a weight is
        # taken when the backward pass comes by, and what it is taken from need not be kept until the end.
        self.parameters = [p for network in trained for p in reversed(network.trainable_params())]
        self.trained_values = sum(parameter.size for parameter in self.parameters)
        loss = DreamBoothLoss(
            model.unet, model.cond_stage_model if options.train_text_encoder else None, self.schedule,
            options.prior_loss_weight if options.with_prior_preservation else None,
        )  # fmt: skip
        self.optimizer = AdamW(self.parameters, options.betas, options.weight_decay, decoupled=options.optim == "adamw")
        self.learning_rate = LearningRate(options.start_learning_rate, options.end_learning_rate, options.warmup_steps, options.decay_steps)
        self.loss_scale = LossScale(options.init_loss_scale if config.use_fp16 else 1.0, options.loss_scale_factor, options.scale_window)
        accumulates = options.gradient_accumulation_steps > 1
        max_grad_norm = options.max_grad_norm if options.clip_grad else None
        update = Update(self.optimizer, max_grad_norm, config.use_fp16, scales=config.use_fp16 or accumulates)
        self.step = TrainStep(loss, self.optimizer, update, accumulates)
        self.accumulated_update = AccumulatedUpdate(self.step) if accumulates else None
        self.average = MovingAverage(self.parameters) if options.use_ema else None
        self.text = self._encode_prompts()

    def _encode_prompts(self) -> list[np.ndarray]:
        """What the loss takes as text, for instance and class samples: token ids, or the context, computed once."""
        prompts = [self.options.instance_prompt] + ([self.options.class_prompt] if self.data.class_paths else [])
        token_ids = Tokenizer(self.config.text_encoder.context_length)(prompts)
        if self.options.train_text_encoder:
            return list(token_ids)
        return list(self.model.cond_stage_model(Tensor(token_ids)).asnumpy().astype(np.float32))

    def batch(self, draws: list[Draw]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, text, t and noise of the given draws, instance draws first."""
        moments = self.moments(draws)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        t, noise, posterior_noise = zip(*(self.data.noise(draw, shape, self.schedule.timesteps) for draw in draws))
        latents = posterior_sample(moments, np.stack(posterior_noise), self.config.autoencoder.scale_factor)
        text = np.repeat(np.stack(self.text), len(draws) // len(self.text), axis=0)
        return Tensor(latents), Tensor(text), Tensor(np.array(t, np.int32)), Tensor(np.stack(noise))

    def compile(self) -> None:
        """Compile the step's graphs without running them: into the compile cache, where that is on."""
        zero = Tensor(0.0, ms.float32)
        draws = next(self.data.batches(self.options.train_batch_size, 1))
        self.step.compile(*self.batch(draws), *[zero] * 5)
        if self.accumulated_update:
            self.accumulated_update.compile(*[zero] * 4)

    def one_update(self) -> tuple[np.ndarray, float, bool]:
        """Train on the next samples: mean (loss, instance, class), gradient norm, whether an overflow skipped it."""
        options, count = self.options, self.options.gradient_accumulation_steps
        scale = self.loss_scale.value
        rate = self.learning_rate(self.global_step)
        inverse_scale = Tensor(1 / (scale * count), ms.float32)
        scalars = [inverse_scale, *self.optimizer.scalars(self.updates_applied + 1, rate)]
        losses = []
        for draws in self.data.batches(options.train_batch_size, count, self.global_step * count):
            *terms, applied, norm = self.step(*self.batch(draws), Tensor(scale, ms.float32), *scalars)
            losses.append([float(term) for term in terms])
        if self.accumulated_update:
            applied, norm = self.accumulated_update(*scalars)
        losses = np.mean(losses, axis=0) * [count, 1, 1]  # the step divides its loss by the scale and the count
        skipped = not bool(applied)
        self.global_step += 1
        self.updates_applied += not skipped
        if self.config.use_fp16:
            self.loss_scale.update(skipped)
        if self.average and not skipped:
            self.average.update(self.updates_applied)
        return losses, float(norm), skipped

    def run(self) -> Iterator[Report]:
        """Train to the end, yielding a report after every update. Raises FloatingPointError for a loss that is not finite."""
        first = self.global_step + 1
        while self.global_step < self.total_steps:
            rate = self.learning_rate(self.global_step)
            losses, norm, skipped = self.one_update()
            if not np.isfinite(losses).all() and not self.config.use_fp16:
                raise FloatingPointError(f"the loss is {losses[0]} at step {self.global_step}: lower start_learning_rate")
            if self.global_step == first:
                start, speed, left = time.perf_counter(), 0.0, 0.0  # compiling is not counted
            else:
                seconds = (time.perf_counter() - start) / (self.global_step - first)
                speed, left = self.samples_per_update * len(self.text) / seconds, seconds * (self.total_steps - self.global_step)
            yield Report(self.global_step, self.total_steps, self.epoch, *losses, rate, speed, left, norm, self.loss_scale.value, skipped)

    @property
    def epoch(self) -> int:
        """The epoch, from 1, that the last update belongs to."""
        return max(1, math.ceil(self.global_step * self.samples_per_update / self.data.samples_per_epoch - 1e-9))

    def finished_epoch(self) -> int | None:
        """The epoch that the last update finished, if it did."""
        per_epoch = self.data.samples_per_epoch
        before, now = ((self.global_step - k) * self.samples_per_update // per_epoch for k in (1, 0))
        now = min(now, self.options.epochs) if self.global_step < self.total_steps else self.options.epochs
        return now if now > before else None

    def release_frozen(self, folder: Path) -> None:
        """Move the frozen networks, which nothing needs any more, out of memory, into a nameless file in `folder`."""
        for name in ["first_stage_model"] + ([] if self.options.train_text_encoder else ["cond_stage_model"]):
            self.released |= spill(getattr(self.model, name), folder)
            delattr(self.model, name)
        runtime.release_memory()

    def save(self, folder: Path, epoch: int) -> list[Path]:
        """Write the whole model's weights, and with EMA the averaged ones beside them."""
        weights = weights_of(self.model) | self.released
        paths = [folder / f"dreambooth_epoch_{epoch}.ckpt"]
        save_weights(weights, paths[0])
        if self.average:
            paths.append(folder / f"dreambooth_epoch_{epoch}_ema.ckpt")
            save_weights(weights | self.average.weights(), paths[1])
        return paths


class MetricsFile:
    """Reports as JSON lines."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, report: Report) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in vars(report).items()}
        self._file.write(json.dumps(finite) + "\n")
