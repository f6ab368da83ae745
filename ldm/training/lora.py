"""Which additions a LoRA training has, and what they begin as."""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from ldm.config import ModelConfig
from ldm.fields import lora_target_names
from ldm.networks.latent_diffusion import LatentDiffusion
from ldm.networks.lora import Size, add_lora
from ldm.options import TrainOptions
from ldm.random_streams import LORA, stream
from ldm.values import ConfigError
from ldm.weights.lora_files import Lora, read_lora
from ldm.weights.lora_merge import fingerprint_of, require_same_version
from ldm.weights.lora_units import DOWN, UP, Unit, units_of
from ldm.weights.lora_writing import LoraWriter, metadata_of

RANK = 4  # as in 2023
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraPlan:
    """The additions that a run trains.

    Attributes:
        units: what they are of, by name, in the order of the model.
        numbers: of each, among all that the model could have: whichever are chosen, an addition begins as the
            same.
        sizes: rank and alpha of each.
        start: the LoRA that they begin as, or None.
    """

    units: dict[str, Unit]
    numbers: dict[str, int]
    sizes: dict[str, Size]
    start: Lora | None = None

    @property
    def values(self) -> int:
        """How many values are trained."""
        return sum(
            math.prod(shape)
            for name, unit in self.units.items()
            for shape in unit.shapes(self.sizes[name].rank)
        )

    def writer(self, options: TrainOptions, model: LatentDiffusion) -> LoraWriter:
        """What writes the additions, for others to read.

        Args:
            model: the base model, whole.
        """
        base = fingerprint_of({parameter.name: parameter for parameter in model.get_parameters()})
        texts = metadata_of(options, model.config, self.sizes, base)
        alphas = {name: size.alpha for name, size in self.sizes.items()}
        dtype = np.dtype(np.float16 if options.lora_fp16 else np.float32)
        return LoraWriter(self.units, alphas, options.lora_format, dtype, texts)

    def add_to(self, model: LatentDiffusion, dropout: float, seed: int) -> list[Parameter]:
        """Put the additions into a model, as they begin: A Kaiming uniform with a = sqrt(5), as PEFT has it,
        B zero.

        Returns:
            Their parameters, in the order of the model.
        """
        parameters = add_lora(model, self.sizes, dropout, model.layers)
        for name, unit in self.units.items():
            down, up = parameters[name + DOWN], parameters[name + UP]
            pair = self.start.pairs.get(name) if self.start else None
            if pair is None:
                bound = 1 / math.sqrt(math.prod(unit.shape[1:]))
                first = stream(seed, LORA, self.numbers[name]).uniform(-bound, bound, down.shape)
                values = first, np.zeros(up.shape)
            else:
                values = pair.down.reshape(down.shape), pair.up.reshape(up.shape)
            for parameter, value in zip((down, up), values):
                parameter.set_data(Tensor(value.astype(np.float32)))
        return list(parameters.values())


def plan_lora(
    options: TrainOptions, config: ModelConfig, model: LatentDiffusion
) -> tuple[TrainOptions, LoraPlan | None]:
    """The additions that the options ask for and those of the LoRA to go on from; None without LoRA.

    Returns:
        The options with rank and alpha as they are, and the plan.

    Raises:
        ConfigError: the options do not belong to that LoRA.
        ValueError, FileNotFoundError: as `read_lora` and `require_same_version` do.
    """
    if not options.use_lora:
        return options, None
    units = units_of(model.parameter_shapes(), config)
    targets = lora_target_names(options.lora_targets)
    wanted = {
        name
        for name, unit in units.items()
        if unit.target in targets and (options.train_text_encoder or not unit.is_of_text)
    }
    start = _read_start(options, config, units) if options.lora_ckpt_path else None
    there = {} if start is None else {name: Size(p.rank, p.alpha) for name, p in start.pairs.items()}
    common = Counter(there.values()).most_common(1)[0][0] if there else None
    rank = options.lora_rank or (common.rank if common else RANK)
    alpha = options.lora_alpha or (common.alpha if common and not options.lora_rank else float(rank))
    for text, given, own in (("rank", options.lora_rank, "rank"), ("alpha", options.lora_alpha, "alpha")):
        found = {getattr(size, own) for size in there.values()}
        if given and found - {given}:
            raise ConfigError(
                f"lora_{text} is {given:g}, {start.path} has {', '.join(f'{n:g}' for n in sorted(found))}: "
                f"leave it out"
            )
    chosen = {name: unit for name, unit in units.items() if name in wanted or name in there}
    sizes = {name: there.get(name, Size(rank, alpha)) for name in chosen}
    numbers = {name: number for number, name in enumerate(units) if name in chosen}
    plan = LoraPlan(chosen, numbers, sizes, start)
    logger.info("LoRA: %d additions of rank %d, %.2fM values", len(chosen), rank, plan.values / 1e6)
    return replace(options, lora_rank=rank, lora_alpha=alpha), plan


def _read_start(options: TrainOptions, config: ModelConfig, units: Mapping[str, Unit]) -> Lora:
    lora = read_lora(Path(options.lora_ckpt_path), units)
    require_same_version(lora, config)
    of_text = [units[name] for name in lora.pairs if units[name].is_of_text]
    if of_text and not options.train_text_encoder:
        raise ConfigError(
            f"lora_ckpt_path {lora.path}: has {len(of_text)} additions to the text encoder, which "
            f"train_text_encoder=False leaves out: train it too, or merge the file into the base model first "
            f"(scripts/merge_lora.py)"
        )
    attention = {unit.weight for unit in of_text if unit.part is not None}
    halves = [name for name in (u.name for u in units.values() if u.weight in attention)
              if name not in lora.pairs]  # fmt: skip
    if halves and "attention" not in lora_target_names(options.lora_targets):
        raise ConfigError(
            f"lora_ckpt_path {lora.path}: lacks {halves[0]} beside its neighbours: give --lora_targets with "
            f"attention"
        )
    logger.info("%s: going on from %d additions of rank %s", lora.path, len(lora.pairs), lora.ranks())
    return lora
