"""The loop around the training step: it feeds it, keeps count, and reports every update. It knows no files.

The same step in plain PyTorch, and equal to it: tests/training/test_trainer.py, torch_training.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor

from ldm.config import ModelConfig
from ldm.device import graphs_not_kept, is_dry_run, is_on_cpu, memory_in_use
from ldm.fields import OPTIMIZERS
from ldm.memory import release_memory, training_bytes
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.networks.layers import weights_of_products
from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.schedule import NoiseSchedule
from ldm.training.inputs import Inputs
from ldm.training.lora import LoraPlan
from ldm.training.loss import DreamBoothLoss
from ldm.training.masters import Masters
from ldm.training.optim import MovingAverage, Trainees
from ldm.training.other_optimizers import make_optimizer
from ldm.training.progress import Progress
from ldm.training.rates import LearningRate, LossScale
from ldm.training.report import Report, TooManyOverflows, UpdateResult
from ldm.training.text_part import KINDS, UNET, TextStop, Word, kind_of, ratios_of
from ldm.training.trained import make_trainable, trained_networks
from ldm.training.update import Update
from ldm.weights.arrays import as_numpy, is_finite
from ldm.weights.checkpoint import blank_values, require_values

COUNTERS = ("global_step", "updates_applied")  # of the trainer's state
MOST_APART = 0.01  # of the largest value of an array: what roundings do to weights within an epoch
MAX_SKIPPED_IN_A_ROW = 50  # updates; a loss scale that halves 50 times has left float16's range long before
logger = logging.getLogger(__name__)


def build_trainer(  # noqa: PLR0913
    model: LatentDiffusion, inputs: Inputs, options: TrainOptions, config: ModelConfig, ranks: Ranks = ALONE,
    lora: LoraPlan | None = None, text_stop: int | None = None, start: int = 0,
) -> "Trainer":  # fmt: skip
    """The trainer of a model as the options say. It holds the networks that are trained, and no other.

    Args:
        text_stop: the update after which the text encoder is trained no longer; None: to the end.
        start: how many updates a state that is restored next has behind it.
    """
    word = Word.of(options, model.cond_stage_model) if options.train_token else None
    parameters = make_trainable(model, options, lora)
    networks = trained_networks(model, options.trains_text)
    halved = [own for network in networks for own in weights_of_products(network)]
    # Adafactor's sums are of a weight, not of several joined
    joins = not is_on_cpu() and options.optim != "adafactor"
    kinds = [kind_of(parameter.name, options) for parameter in parameters]
    masters = Masters(parameters, joins, halved, model.unet.dtype, kinds)

    def make_loss(trains_text: bool) -> DreamBoothLoss:
        return DreamBoothLoss(
            model.unet,
            model.cond_stage_model if trains_text else None,
            NoiseSchedule(config.noise_schedule),
            options.prior_loss_weight if options.with_prior_preservation else None,
            inputs.weighs,
        )

    trainer = Trainer(make_loss, masters, inputs, options, config.precision == "float16", ranks, word)
    if text_stop is not None:
        trainer.text_stop = TextStop(model.cond_stage_model, text_stop)
        if trainer.text_stop.is_reached_by(start):
            trainer.stop_text()
    return trainer


class Trainer:
    """Fine-tunes `masters` on `inputs`.

    Args:
        make_loss: the loss, with the text encoder or without it.
        masters: of the networks' parameters, in the order of `make_trainable`; of kinds, see `kind_of`.
        options: of the optimizer, the loss scale, accumulation and averaging.
        can_overflow: float16 compute.
        ranks: the processes that train together; each takes its part of every batch.
        word: whose embedding is trained apart from the table, or None.

    Attributes:
        text_stop: when the text encoder stops to be trained, or None.
    """

    def __init__(  # noqa: PLR0913
        self, make_loss: Callable[[bool], DreamBoothLoss], masters: Masters, inputs: Inputs,
        options: TrainOptions, can_overflow: bool = False, ranks: Ranks = ALONE,
        word: Word | None = None,
    ) -> None:  # fmt: skip
        self.masters, self.inputs, self.options, self.ranks = masters, inputs, options, ranks
        self.make_loss, self.can_overflow, self.word = make_loss, can_overflow, word
        self.text_stop: TextStop | None = None
        self.global_step = 0  # updates done
        self.updates_applied = (
            0  # without those that an overflow skipped: Adam's bias correction counts these
        )
        self.skipped_in_a_row = 0
        self.trained_values = sum(parameter.size for parameter in masters.trained)
        loss = make_loss(options.trains_text)
        values = sum(parameter.size for parameter in loss.get_parameters())
        self.bytes_needed = training_bytes(values, self.trained_values, OPTIMIZERS[options.optim])
        scales = can_overflow or options.gradient_accumulation_steps > 1 or options.clip_grad
        kinds = [KINDS.index(masters.kind(place)) for place in range(len(masters.trained))]
        trained = Trainees(masters.trained, masters.decayed, kinds, ratios_of(options))
        self.optimizer = make_optimizer(options, trained, scales)
        self.learning_rate = LearningRate.of(options)
        first_scale = options.init_loss_scale if can_overflow else 1.0
        self.loss_scale = LossScale(first_scale, options.loss_scale_factor, options.scale_window)
        self.update = Update(loss, masters, self.optimizer, options, can_overflow, ranks)
        self.average = MovingAverage(masters.trained) if options.use_ema else None
        self.mends_last_bits = not is_on_cpu()

    def stop_text(self) -> None:
        """From now on the text encoder is as it is: its features of the prompts are inputs, and gradients are
        those of the UNet alone. States go on to have all that they had.
        """
        self.text_stop.encode(self.inputs)
        self.update = None
        release_memory()
        masters, places = self.masters.part({UNET})
        self.update = Update(
            self.make_loss(False),
            masters,
            self.optimizer.part(places),
            self.options,
            self.can_overflow,
            self.ranks,
        )
        self.text_stop.is_done = True

    def compile(self) -> None:
        """Compile the step's graphs into the compile cache. The weights go, to make room for that."""
        blank_values(self.update.step)
        release_memory()
        self.update.compile(next(self.inputs.batches(self.options.train_batch_size, 1)))

    def one_update(self) -> UpdateResult:
        """Train on the next samples."""
        stop = self.text_stop
        if not stop or stop.is_done or not stop.is_reached_by(self.global_step):
            return self._one_update()
        stop.say()
        with graphs_not_kept():  # those are numbered by their order, and here a run may begin or not
            self.stop_text()
            return self._one_update()

    def _one_update(self) -> UpdateResult:
        size, count = self.options.train_batch_size, self.options.gradient_accumulation_steps
        scale, rate = self.loss_scale.value, self.learning_rate(self.global_step)
        scalars = self.update.optimizer.scalars(self.updates_applied + 1, rate)
        batches = self.inputs.batches(size, count, self.global_step, self.ranks)
        losses, norm, is_good = self.update(batches, scale, 1 / (scale * count), scalars)
        self._count(skipped=not is_good)
        mean = self.ranks.mean(losses).astype(np.float64)  # between processes it is float32
        return UpdateResult(mean, norm, not is_good)

    def _count(self, skipped: bool) -> None:
        """After an update: counters, loss scale, averages."""
        self.global_step += 1
        self.updates_applied += not skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.can_overflow:
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
        spent, speed, left = 0.0, 0.0, 0.0
        while self.global_step < total:
            rate, start = self.learning_rate(self.global_step), time.perf_counter()
            losses, norm, skipped = self.one_update()
            self._require_that_it_can_continue(losses)
            if self.global_step > first:  # compiling is not counted, nor what is done between updates
                spent += time.perf_counter() - start
                seconds = spent / (self.global_step - first)
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
                memory_in_use() / 1e9,
            )

    def _require_that_it_can_continue(self, losses: np.ndarray) -> None:
        if not np.isfinite(losses).all() and not self.can_overflow and not is_dry_run():
            raise FloatingPointError(
                f"the loss is {losses[0]} at step {self.global_step}: lower start_learning_rate, or give "
                f"--clip_grad"
            )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TooManyOverflows(
                f"{self.skipped_in_a_row} updates in a row overflowed in float16, up to step "
                f"{self.global_step}: lower start_learning_rate, give --clip_grad, or --precision float32"
            )

    def require_equal_weights(self) -> None:
        """Raises ValueError where the processes' trained weights are not the same, bit by bit."""
        self.ranks.require_equal(self._trained_arrays(), "trained weights")

    def agree_on_weights(self) -> None:
        """Raises ValueError where the processes' trained weights have come apart.

        On a CPU they are the same, bit by bit. On an Ascend a sum over processes may have other last bits in
        each: there rank 0's weights, moments and averages become everyone's, and a warning says so, up to
        MOST_APART.
        """
        if not self.mends_last_bits:
            return self.require_equal_weights()
        different = self.ranks.differing(self._trained_arrays())
        if not different:
            return None
        apart = 0.0
        for arrays in self._state_arrays().values():
            for array in arrays:
                mine = array.asnumpy()
                theirs = self.ranks.first(mine)
                if arrays is self.masters.trained:
                    apart = max(apart, float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-30)))
                array.set_data(Tensor(theirs))
        for name, values in self.optimizer.counters().items():
            self.optimizer.restore_counters({name: self.ranks.first(np.array(values)).tolist()})
        apart = self.ranks.largest(apart)
        text = "trained weights of rank %s differ from rank 0's, by %.1e of the largest: all take rank 0's"
        logger.warning(text, ", ".join(map(str, different)), apart)
        if apart > MOST_APART:
            raise ValueError(
                f"trained weights differ between the processes, by {apart:.1e} of the largest: more than "
                f"roundings do"
            )
        self.masters.follow()

    def _trained_arrays(self) -> Iterator[np.ndarray]:
        return (array.asnumpy() for array in self.masters.trained)

    def require_finite_weights(self) -> None:
        """Raises FloatingPointError where a trained weight is NaN or infinite."""
        weights = {} if is_dry_run() else self.weights()
        broken = [name for name, array in weights.items() if not is_finite(as_numpy(array))]
        if broken:
            raise FloatingPointError(
                f"{len(broken)} weights are not finite after step {self.global_step} ({broken[0]}): "
                "lower start_learning_rate"
            )

    def weights(self) -> Mapping[str, Parameter | np.ndarray]:
        """The trained weights by name, float32."""
        return self._named(self.masters.trained)

    def _named(self, arrays: ParameterTuple) -> Mapping[str, Parameter | np.ndarray]:
        named = self.masters.named(arrays)
        return self.word.into_table(named) if self.word else named

    def averages(self) -> Mapping[str, Parameter | np.ndarray] | None:
        """With EMA the averages under the names of the weights."""
        return self._named(self.average.average) if self.average else None

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the networks have the averaged weights, where there are any. Afterwards they are
        as they were, to the bit.
        """
        if self.average:
            self._exchange_averages()
        try:
            yield
        finally:
            if self.average:
                self._exchange_averages()

    def _exchange_averages(self) -> None:
        for average, trained in zip(self.average.average, self.masters.trained):
            before = trained.asnumpy().copy()
            trained.set_data(Tensor(average.asnumpy().copy()))
            average.set_data(Tensor(before))
        self.masters.follow()

    def _state_arrays(self) -> dict[str, ParameterTuple]:
        """What a state has for every weight, by the prefix of the names there."""
        arrays = {"": self.masters.trained, **self.optimizer.arrays}
        return arrays | ({"ema.": self.average.average} if self.average else {})

    def state(self) -> tuple[Mapping[str, Parameter | np.ndarray], dict]:
        """What the next update depends on, between two updates: arrays by name, and counters as JSON takes
        them.
        """
        named = {}
        for prefix, arrays in self._state_arrays().items():
            named |= self.masters.named(arrays, prefix)
        counters = {name: getattr(self, name) for name in COUNTERS} | self.optimizer.counters()
        if self.can_overflow:
            counters |= {"loss_scale": self.loss_scale.value, "good_updates": self.loss_scale.good_updates}
        return named, counters

    def restore(self, arrays: Mapping[str, np.ndarray], counters: dict, source: str) -> None:
        """Go back to a state. Raises ValueError where it is not of this configuration.

        The loss scale is taken over between float16 runs only; what it grows and shrinks by are options.
        """
        shapes = {}
        for prefix, own in self._state_arrays().items():
            shapes |= self.masters.shapes(own, prefix)
        require_values(shapes, arrays, source)
        for prefix, own in self._state_arrays().items():
            self.masters.fill(own, arrays, prefix)
        for name in COUNTERS:
            setattr(self, name, int(counters[name]))
        self.optimizer.restore_counters(counters)
        if self.text_stop and self.text_stop.is_done:
            self.text_stop.encode(self.inputs)
        if self.can_overflow and "loss_scale" in counters:
            self.loss_scale.value, self.loss_scale.good_updates = (
                float(counters["loss_scale"]),
                int(counters["good_updates"]),
            )
