"""The loop around the training step: `Trainer` feeds it, keeps count, and writes checkpoints.

It shows nothing itself but reports every update to its caller.
"""

import dataclasses
import logging
import math
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ldm import device as runtime
from ldm.config import ModelConfig
from ldm.networks.attention import BasicTransformerBlock
from ldm.networks.autoencoder import posterior_sample
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer
from ldm.training.latent_cache import Moments
from ldm.training.loss import DreamBoothLoss
from ldm.training.optim import AdamW, LearningRate, LossScale, MovingAverage
from ldm.training.samples import Draw, DreamBoothData
from ldm.training.train_step import AccumulatedUpdate, TrainStep, Update
from ldm.weights.checkpoint import fill, is_finite, save_weights, spill, weights_of
from ldm.weights.mindspore_ckpt import WeightFile

PROGRESS = ("global_step", "updates_applied")  # numbers of updates, of the trainer's state
MAX_SKIPPED_IN_A_ROW = 50  # updates; a loss scale that halves 50 times has left float16's range long before
logger = logging.getLogger(__name__)


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


class TooManyOverflows(FloatingPointError):
    """Float16 overflowed in update after update; the weights are still those of before."""


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


def total_updates(options: TrainOptions, samples_per_epoch: int, ranks: Ranks = ALONE) -> int:
    """The updates of a whole run; the last one is filled up with samples of one epoch more."""
    return math.ceil(options.epochs * samples_per_epoch / (options.samples_per_update * ranks.size))


def checkpoints_to_come(options: TrainOptions, samples_per_epoch: int, ranks: Ranks = ALONE, global_step: int = 0) -> int:
    """How many epochs that end after update `global_step` leave a checkpoint."""
    interval, epochs = options.ckpt_save_interval, options.epochs
    done = global_step * options.samples_per_update * ranks.size // samples_per_epoch
    return max(0, epochs // interval - done // interval + (epochs % interval > 0 and done < epochs))


def bytes_on_disk(model: LatentDiffusion, options: TrainOptions) -> tuple[int, int, int]:
    """Of the checkpoints of an epoch, of a saved state, and of the frozen networks that `release_frozen` puts there.

    All is float32: the weights, with EMA twice; the trained ones, their moments and averages.
    """
    trained = sum(p.size for network in trained_networks(model, options) for p in network.get_parameters())
    whole = sum(p.size for p in model.get_parameters())
    return 4 * whole * (1 + options.use_ema), 4 * trained * (3 + options.use_ema), 4 * (whole - trained) * options.cache_latents


class Trainer:
    """Fine-tunes UNet and, where asked, text encoder on DreamBoothData. The VAE is always frozen.

    Args:
        moments: what the VAE makes of the drawn pictures, see ldm/latent_cache.py.
        ranks: the processes that train together; each takes its part of every batch.
    """

    def __init__(
        self, model: LatentDiffusion, config: ModelConfig, options: TrainOptions, data: DreamBoothData, moments: Moments,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.model, self.config, self.options, self.data, self.moments, self.ranks = model, config, options, data, moments, ranks
        self.schedule = NoiseSchedule(config.noise_schedule)
        self.names = [parameter.name for parameter in model.get_parameters()]  # in the order of a checkpoint
        self.released: Mapping[str, np.ndarray] = {}
        self.global_step = 0
        self.skipped_in_a_row = 0
        self.updates_applied = 0  # without those that an overflow skipped: Adam's bias correction counts these
        self.samples_per_update = options.samples_per_update * ranks.size
        self.total_steps = total_updates(options, data.samples_per_epoch, ranks)

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
        update = Update(self.optimizer, max_grad_norm, config.use_fp16, scales=config.use_fp16 or accumulates, ranks=ranks)
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
        for draws in self.data.batches(options.train_batch_size, count, self.global_step * count, self.ranks.rank, self.ranks.size):
            *terms, applied, norm = self.step(*self.batch(draws), Tensor(scale, ms.float32), *scalars)
            losses.append([float(term) for term in terms])
        if self.accumulated_update:
            applied, norm = self.accumulated_update(*scalars)
        losses = self.ranks.mean(np.mean(losses, axis=0)) * [count, 1, 1]  # the step divides its loss by the scale and the count
        skipped = not bool(applied)
        self.global_step += 1
        self.updates_applied += not skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.config.use_fp16:
            self.loss_scale.update(skipped)
        if self.average and not skipped:
            self.average.update(self.updates_applied)
        return losses, float(norm), skipped

    def run(self) -> Iterator[Report]:
        """Train to the end, yielding a report after every update.

        Raises:
            FloatingPointError: a float32 loss that is not finite, after which the weights are lost; or in float16 too many
                updates skipped in a row, which leave the weights as they were.
        """
        first = self.global_step + 1
        while self.global_step < self.total_steps:
            rate = self.learning_rate(self.global_step)
            losses, norm, skipped = self.one_update()
            if not np.isfinite(losses).all() and not self.config.use_fp16:
                raise FloatingPointError(
                    f"the loss is {losses[0]} at step {self.global_step}: lower start_learning_rate, or give --clip_grad"
                )
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TooManyOverflows(
                    f"{self.skipped_in_a_row} updates in a row overflowed in float16, up to step {self.global_step}: lower "
                    "start_learning_rate, give --clip_grad, or set use_fp16: False in the model configuration"
                )
            if self.global_step == first:
                start, speed, left = time.perf_counter(), 0.0, 0.0  # compiling is not counted
            else:
                seconds = (time.perf_counter() - start) / (self.global_step - first)
                speed, left = self.samples_per_update * len(self.text) / seconds, seconds * (self.total_steps - self.global_step)
            yield Report(self.global_step, self.total_steps, self.epoch, *losses, rate, speed, left, norm, self.loss_scale.value, skipped)

    @property
    def epoch(self) -> int:
        """The epoch, from 1, that the last update belongs to."""
        reached = math.ceil(self.global_step * self.samples_per_update / self.data.samples_per_epoch - 1e-9)
        return min(max(1, reached), self.options.epochs)

    def epochs_done(self, global_step: int) -> int:
        return global_step * self.samples_per_update // self.data.samples_per_epoch

    def finished_epoch(self) -> int | None:
        """The epoch that the last update finished, if it did."""
        before, now = (self.epochs_done(self.global_step - k) for k in (1, 0))
        now = min(now, self.options.epochs) if self.global_step < self.total_steps else self.options.epochs
        return now if now > before else None

    def require_equal_weights(self) -> None:
        """Raises ValueError where the processes' trained weights are not the same, bit by bit."""
        self.ranks.require_equal((parameter.asnumpy() for parameter in self.parameters), "trained weights")

    def release_frozen(self, folder: Path) -> None:
        """Move the frozen networks, which nothing needs any more, out of memory, into a nameless file in `folder`."""
        for name in ["first_stage_model"] + ([] if self.options.train_text_encoder else ["cond_stage_model"]):
            self.released = {**self.released, **spill(getattr(self.model, name), folder)}
            delattr(self.model, name)
        runtime.release_memory()

    def require_finite_weights(self) -> None:
        """Raises FloatingPointError where a trained weight is NaN or infinite."""
        broken = [parameter.name for parameter in self.parameters if not is_finite(parameter.asnumpy())]
        if broken:
            raise FloatingPointError(
                f"{len(broken)} weights are not finite after step {self.global_step} ({broken[0]}): lower start_learning_rate"
            )

    def state(self) -> tuple[dict[str, ms.Parameter], dict]:
        """What the next update depends on, between two updates: parameters by name, and the progress as JSON takes it."""
        parameters = [*self.parameters, *self.optimizer.moment1, *self.optimizer.moment2, *(self.average.average if self.average else ())]
        progress = {name: getattr(self, name) for name in PROGRESS}
        if self.config.use_fp16:
            progress |= {"loss_scale": self.loss_scale.value, "good_updates": self.loss_scale.good_updates}
        return {p.name: p for p in parameters}, progress

    def restore(self, arrays: Mapping[str, np.ndarray], progress: dict, source: str) -> None:
        """Go back to a state. Raises ValueError where it is not of this configuration.

        The loss scale is taken over between float16 runs only; what it grows and shrinks by are options.
        """
        fill(self.state()[0], arrays, source)
        for name in PROGRESS:
            setattr(self, name, int(progress[name]))
        if self.config.use_fp16 and "loss_scale" in progress:
            self.loss_scale.value, self.loss_scale.good_updates = float(progress["loss_scale"]), int(progress["good_updates"])

    def epoch_to_save(self) -> int | None:
        """The epoch that the last update finished, if a checkpoint of it is wanted."""
        epoch = self.finished_epoch()
        return epoch if epoch and (epoch % self.options.ckpt_save_interval == 0 or epoch == self.options.epochs) else None

    def checkpoint_paths(self, folder: Path, epoch: int) -> list[Path]:
        """Where `save` writes: the weights, and with EMA the averaged ones."""
        return [folder / f"dreambooth_epoch_{epoch}{ending}.ckpt" for ending in (("", "_ema") if self.average else ("",))]

    def save(self, folder: Path, epoch: int) -> list[Path]:
        """Write the whole model's weights, and with EMA the averaged ones beside them."""
        paths, weights = self.checkpoint_paths(folder, epoch), [weights_of(self.model), self.released, dict.fromkeys(self.names)]
        averages = self.average.weights() if self.average else {}
        for path, trained in zip(paths, ({}, averages)):
            save_weights(ChainMap(trained, *weights), path, record=True)  # one array of the frozen networks at a time
            logger.info("saved %s", path)
        if self.released:
            self.released = WeightFile(paths[0])  # which has them now: the nameless file goes. No other writes this one, and it stays open
        return paths
