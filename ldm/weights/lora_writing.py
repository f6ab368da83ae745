"""Files of LoRA for this program and others: AUTOMATIC1111, ComfyUI, diffusers, kohya's."""

import datetime
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.config import ModelConfig
from ldm.options import TrainOptions
from ldm.weights.arrays import ArraysInMemory, as_numpy, cast, is_finite
from ldm.weights.lora_files import Pair
from ldm.weights.lora_merge import OWN_METADATA, PREDICTIONS_OF_VERSIONS
from ldm.weights.lora_units import DOWN, UP, Unit
from ldm.weights.safetensors_files import write_safetensors
from ldm.weights.writing import METADATA, save_weights

ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1/lora", "sd_v2": "stable-diffusion-v2-512/lora",
    "sd_v2_v": "stable-diffusion-v2-768-v/lora",
}  # fmt: skip
WIDTHS = {768: "sd_v1", 1024: "sd_v2"}  # of the text features, in models of full size


@dataclass(frozen=True)
class LoraWriter:
    """Writes the additions that a training has.

    Args:
        alphas: of each, by name.
        others: of `write_lora`.
    """

    units: Mapping[str, Unit]
    alphas: Mapping[str, float]
    naming: str
    dtype: np.dtype
    metadata: Mapping[str, str]

    def save(self, weights: Mapping, path: Path, record: bool = False) -> str:
        """Write weights by the names of their layers, with `.lora_down.weight` and `.lora_up.weight`.

        Returns the SHA-256 of the file. Raises as `write_lora` does.
        """
        pairs = {
            name: Pair(as_numpy(weights[name + DOWN]), as_numpy(weights[name + UP]), alpha)
            for name, alpha in self.alphas.items()
        }
        return write_lora(pairs, self.units, path, self.naming, self.dtype, self.metadata, record=record)


def write_lora(  # noqa: PLR0913
    pairs: Mapping[str, Pair], units: Mapping[str, Unit], path: Path, naming: str, dtype: np.dtype,
    metadata: Mapping[str, str], *, record: bool = False, replace: bool = True,
) -> str:  # fmt: skip
    """Write a LoRA; the file appears whole or not at all.

    Args:
        units: what the additions are of, by their names.
        naming: one of ldm.fields.LORA_FORMATS.
        dtype: of the arrays in the file.
        metadata: texts, of `texts_of` or `metadata_of`.
        record, replace: as for ldm.weights.writing.save_weights.

    Returns:
        The SHA-256 of the file.

    Raises:
        OverflowError: a value is too large for the dtype.
        FileExistsError: the file is there, and is not to be replaced.
    """
    arrays = _named(pairs, units, naming, dtype)
    for name, values in arrays.items():
        if not is_finite(values):
            raise OverflowError(f"{name} has values too large for {dtype}: give --lora_fp16=False")
    texts = METADATA | dict(metadata) | {"ss_output_name": path.stem, "modelspec.title": path.stem}
    texts |= _hashes(arrays, texts)
    return save_weights(arrays, path, record, to="safetensors", replace=replace, metadata=texts)


def _named(
    pairs: Mapping[str, Pair], units: Mapping[str, Unit], naming: str, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """In the dtype and order of the file, which is the order of the safetensors library."""
    found = {}
    for name, pair in pairs.items():
        unit, up = units[name], pair.up
        down_shape, up_shape = unit.shapes(pair.rank)
        if naming == "kohya":
            names = [f"{unit.kohya}{ending}" for ending in (DOWN, UP)]
            found[f"{unit.kohya}.alpha"] = np.array(pair.alpha)
        else:
            # there is no alpha that all readers of this form see: it goes into B
            up = up if pair.alpha == pair.rank else up * np.float32(pair.alpha / pair.rank)
            lora = "lora_linear_layer" if unit.is_of_text else "lora"
            names = [f"{unit.diffusers}.{lora}.{way}.weight" for way in ("down", "up")]
        found |= dict(zip(names, (pair.down.reshape(down_shape), up.reshape(up_shape))))
    return {name: cast(np.asarray(found[name]), dtype) for name in sorted(found)}


def _hashes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """What AUTOMATIC1111 knows a file by (sd-scripts, precalculate_safetensors_hashes): SHA-256 of all behind
    the header, and of 64 KiB from 1 MiB on of a file with kohya's texts only.
    """
    file = io.BytesIO()
    texts = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    write_safetensors(file, ArraysInMemory(arrays), texts)
    content = file.getbuffer()
    start = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8],
    }


def version_of(config: ModelConfig) -> str | None:
    """As kohya's programs name it; None for a model of other sizes than the published ones."""
    kind = WIDTHS.get(config.unet.context_dim) if config.unet.model_channels == 320 else None
    is_v = config.noise_schedule.prediction_type == "v_prediction"
    name = f"{kind}_v" if kind and is_v else kind
    return name if name in PREDICTIONS_OF_VERSIONS else None


def texts_of(config: ModelConfig, sizes: Mapping[str, tuple[int, float]], own: Mapping) -> dict[str, str]:
    """Metadata: what a LoRA is an addition to, for this program and in the words of kohya's and of
    Stability's modelspec, which others show.

    Args:
        sizes: rank and alpha of each addition.
        own: what else this program is to note, `base` (the base model's fingerprint) above all.
    """
    ranks, alphas = ({size[place] for size in sizes.values()} for place in (0, 1))
    rank, alpha = (f"{min(values):g}" if len(values) == 1 else "Dynamic" for values in (ranks, alphas))
    version, prediction = version_of(config), config.noise_schedule.prediction_type
    noted = dict(own) | {"prediction_type": prediction, "rank": rank, "alpha": alpha}
    texts = {
        OWN_METADATA: json.dumps(noted),
        "ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha,
        "ss_network_args": "{}", "ss_base_model_version": version,
        "ss_v2": version.startswith("sd_v2") if version else None,
        "modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "modelspec.date": datetime.datetime.now().isoformat(timespec="seconds"),
        "modelspec.architecture": ARCHITECTURES.get(version),
    }  # fmt: skip
    return _as_texts(texts)


def metadata_of(
    options: TrainOptions, config: ModelConfig, sizes: Mapping[str, tuple[int, float]], base: str
) -> dict[str, str]:
    """`texts_of`, and how a LoRA was trained, on the base model with that fingerprint."""
    prompts = ", ".join(its.instance_prompt for its in options.subjects)
    classes = ", ".join(its.class_prompt for its in options.subjects if its.class_prompt) or None
    own = {
        "base": base, "instance_prompt": prompts, "class_prompt": classes,
        "targets": options.lora_targets, "train_text_encoder": options.train_text_encoder,
    }  # fmt: skip
    rate, size = options.start_learning_rate, options.image_size
    text_rate = options.text_encoder_learning_rate or rate
    training = {
        "ss_learning_rate": rate, "ss_unet_lr": rate,
        "ss_text_encoder_lr": text_rate if options.train_text_encoder else None,
        "ss_min_snr_gamma": options.min_snr_gamma, "ss_noise_offset": options.noise_offset or None,
        "ss_caption_dropout_rate": options.caption_dropout or None,
        "ss_seed": options.seed, "ss_num_epochs": None if options.max_updates else options.epochs,
        "ss_max_train_steps": options.max_updates, "ss_zero_terminal_snr": options.zero_terminal_snr or None,
         "ss_resolution": f"({size}, {size})",
        "ss_sd_model_name": options.checkpoint.name, "ss_prior_loss_weight": options.prior_loss_weight,
        "ss_total_batch_size": options.samples_per_update,
        "ss_training_comment": f"DreamBooth: {prompts}",
        "modelspec.resolution": f"{size}x{size}", "modelspec.trigger_phrase": prompts,
    }  # fmt: skip
    return texts_of(config, sizes, own) | _as_texts(training)


def _as_texts(values: Mapping) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}
