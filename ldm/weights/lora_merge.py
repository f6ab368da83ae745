"""Additions merged into the weights of a model as they are read, so that it draws as fast as without."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.config import ModelConfig
from ldm.weights.arrays import Arrays, Made, Renamed, as_numpy, cast
from ldm.weights.lora_files import Lora, Pair, read_lora
from ldm.weights.lora_units import Unit, units_of

OWN_METADATA = "dreambooth_mindspore"  # what this program notes of a LoRA, as JSON
# as kohya's programs name versions (ss_base_model_version)
PREDICTIONS_OF_VERSIONS = {"sd_v1": "epsilon", "sd_v2": "epsilon", "sd_v2_v": "v_prediction"}
# by these a base model is known again; a DreamBooth training changes them all
FINGERPRINT = (
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight",
    "cond_stage_model.transformer.ln_final.gamma",
)
logger = logging.getLogger(__name__)


class Added(NamedTuple):
    """A LoRA and the weight that it is added with."""

    lora: Lora
    weight: float


def split_weight(given: str) -> tuple[Path, float]:
    """`FILE` or `FILE:0.7` as path and weight, 1 where none is given."""
    path, colon, weight = given.rpartition(":")
    if colon and not Path(given).exists():
        try:
            if np.isfinite(number := float(weight)):
                return Path(path), number
        except ValueError:
            pass
    return Path(given), 1.0


def read_loras(
    given: Sequence[str], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, rank: int | None = None
) -> list[Added]:
    """What `--lora_ckpt_path` names: FILE or FILE:WEIGHT, several at once.

    Args:
        shapes: of the model's parameters, by official names.
        rank: that they must have.

    Raises as `read_lora` and `require_same_version` do, and ValueError where they have another rank.
    """
    added, units = [], units_of(shapes, config) if given else {}
    for path, weight in map(split_weight, given):
        lora = read_lora(path, units)
        require_same_version(lora, config)
        if rank and lora.ranks() != str(rank):
            raise ValueError(f"{lora.path}: has rank {lora.ranks()}, lora_rank is {rank}: leave that out")
        text = "%s: %d additions of rank %s, added with weight %g"
        logger.info(text, lora.path, len(lora.pairs), lora.ranks(), weight)
        added.append(Added(lora, weight))
    return added


def own_metadata(lora: Lora) -> dict:
    """What this program has noted of a LoRA; nothing where it is another's."""
    try:
        return dict(json.loads(lora.metadata.get(OWN_METADATA, "{}")))
    except (ValueError, TypeError, RecursionError):
        return {}


def require_same_version(lora: Lora, config: ModelConfig) -> None:
    """Raises ValueError where a LoRA says that its model's UNet predicted something else; that its sizes fit
    is seen when it is read.
    """
    said = own_metadata(lora).get("prediction_type") or lora.metadata.get("modelspec.prediction_type")
    said = said or PREDICTIONS_OF_VERSIONS.get(lora.metadata.get("ss_base_model_version"))
    said = {"v": "v_prediction"}.get(said, said)
    own = config.noise_schedule.prediction_type
    if said in PREDICTIONS_OF_VERSIONS.values() and said != own:
        raise ValueError(
            f"{lora.path}: was trained on a version of Stable Diffusion that predicts {said}, this base "
            f"model predicts {own}: give the base model that belongs to it"
        )


def fingerprint_of(arrays: Mapping) -> str:
    """Of a base model, by official names: the same in float32 and float16, in every format."""
    digest = hashlib.sha256()
    for name in FINGERPRINT:
        digest.update(np.ascontiguousarray(cast(as_numpy(arrays[name]), np.dtype(np.float16))).tobytes())
    return digest.hexdigest()


def say_if_of_another_base(added: Sequence[Added], arrays: Mapping) -> None:
    noted = [(lora, own_metadata(lora).get("base")) for lora, _ in added]
    if not any(base for _, base in noted) or not all(name in arrays for name in FINGERPRINT):
        return
    own = fingerprint_of(arrays)
    for lora, base in noted:
        if base and base != own:
            logger.info("%s: was trained on another base model of the same version", lora.path)


def merged(arrays: Arrays, added: Sequence[Added]) -> Arrays:
    """A model's arrays by official names, with LoRA files merged into them."""
    if not added:
        return arrays
    say_if_of_another_base(added, arrays)
    return Merged(arrays, added)


class Merged(Renamed):
    """A model's arrays by official names, with additions; those that get one are float32."""

    def __init__(self, arrays: Arrays, added: Sequence[Added]) -> None:
        super().__init__(arrays, {name: Made([name], arrays.shape(name)) for name in arrays})
        self._added: dict[str, list[tuple[Unit, Pair, float]]] = {}
        for lora, weight in added:
            for name, pair in lora.pairs.items():
                unit = lora.units[name]
                self._added.setdefault(unit.weight, []).append((unit, pair, weight))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._added else super().dtype(name)

    def __getitem__(self, name: str) -> np.ndarray:
        values = super().__getitem__(name)
        if name not in self._added:
            return values
        values = values.astype(np.float32)
        rows = values.reshape(len(values), -1)
        for unit, pair, weight in self._added[name]:
            own = rows if unit.part is None else np.split(rows, 3)[unit.part]
            own += np.float32(weight) * pair.delta()
        return values
