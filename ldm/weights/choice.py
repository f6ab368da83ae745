"""Which model configuration belongs to weights, and whether the one that is given does."""

import dataclasses
import logging
from pathlib import Path
from typing import Protocol

import numpy as np

from ldm.config import ModelConfig, model_config_from, read_mapping, read_model_config
from ldm.device import start_device
from ldm.schedule import NoiseSchedule
from ldm.values import ConfigError
from ldm.versions import VERSIONS, configurations
from ldm.weights.arrays import Arrays
from ldm.weights.diffusers_folder import config_of_folder
from ldm.weights.digests import recorded_digests
from ldm.weights.recognition import POSITIONS, Shapes, key_shapes, what_it_is
from ldm.weights.source import Source, open_weights

LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.beta"
PREDICTIONS = {"epsilon": "the noise (epsilon)", "v_prediction": "v (v_prediction)"}
logger = logging.getLogger(__name__)


class ModelOptions(Protocol):
    """What the options of both commands say of the model."""

    checkpoint: Path
    model_config: str
    version: str | None
    variant: str | None
    use_ema_weights: bool
    zero_terminal_snr: bool


def open_model(options: ModelOptions) -> Source:
    """The weights that the options name, with the model configuration that belongs to them.

    Raises as `open_weights` and `choose_config` do.
    """
    source = open_weights(options.checkpoint, options.variant, options.use_ema_weights)
    source = choose_config(source, options.model_config, options.version)
    return source.ending_in_noise() if options.zero_terminal_snr else source


def put_on_device(options, source: Source):
    """Options of either command, and the model, with the device in use and the precision that networks
    compute in there. Raises as ldm.device.start_device and ldm.precision.settle_precision do.
    """
    device = start_device(options.device, options.mode, options.deterministic)
    source = source.on_this_device(options.precision, options.force_precision)
    return dataclasses.replace(options, device=device, precision=source.config.precision), source


def choose_config(source: Source, given: str = "auto", version: str | None = None) -> Source:
    """Weights with the model configuration that belongs to them.

    Args:
        given: a YAML file, or auto: that of the version; without one what a folder of diffusers or the run
            that wrote a checkpoint says itself; else the first configuration beside the program whose shapes
            are those in the file.

    Raises:
        ConfigError: the configuration and the weights do not belong together, or none fits.
    """
    stated = config_of_folder(source.configs, source.path) if source.configs else config_of_run(source.path)
    if given == "auto" and version:
        given = VERSIONS[version].model_config
    if given != "auto":
        config = read_model_config(given)
        _require_fit(source, config, given, stated)
        if stated:  # which no configuration beside the program says
            schedule = dataclasses.replace(
                config.noise_schedule, zero_terminal_snr=stated.noise_schedule.zero_terminal_snr
            )
            config = dataclasses.replace(config, noise_schedule=schedule)
    elif stated:
        config, given = stated, "its own configurations" if source.configs else "its run"
        _require_shapes(source, config, given)
    else:
        config, given = _first_that_fits(source)
    _require_schedule(source, config, given)
    prediction = PREDICTIONS[config.noise_schedule.prediction_type]
    assumed = "" if stated else ", which no single file is bound to say: if wrong, give -v or a YAML"
    known_by = f"{name_of(config)}by {given}; predicts {prediction}{assumed}"
    return dataclasses.replace(source, config=config, known_by=known_by, is_stated=stated is not None)


def config_of_run(path: Path) -> ModelConfig | None:
    """Of a checkpoint that lies in the folder of the run that wrote it, what the run was made with; but for
    the precision, which is the device's there.
    """
    noted = path.parent / "effective_config.json"
    is_own = any(name.split("/")[0] == path.name for name in recorded_digests(path.parent))
    return dataclasses.replace(config_in(noted), precision="auto") if is_own and noted.is_file() else None


def config_in(noted: Path) -> ModelConfig:
    """Of a run's effective_config.json."""
    return model_config_from(read_mapping(noted).get("model"), f"{noted}: model")


def name_of(config: ModelConfig) -> str:
    """What people call a model with these sizes, as the beginning of a line."""
    kinds = {(320, 768): "Stable Diffusion 1, ", (320, 1024): "Stable Diffusion 2, "}
    return kinds.get((config.unet.model_channels, config.unet.context_dim), "")


def _first_that_fits(source: Source) -> tuple[ModelConfig, str]:
    shapes = Shapes(source.arrays)
    all_there = [(read_model_config(name), name) for name in configurations()]
    fitting = [(config, name) for config, name in all_there if shapes.fit(config)]
    if not fitting:
        raise ConfigError(f"{source.path}: {what_it_is(source.arrays) or _nearest(shapes, all_there)}")
    for version in VERSIONS.values():
        if version.file == source.path.name:
            fitting.sort(key=lambda fit: fit[1] != version.model_config)
            return fitting[0]
    hinted, why = hinted_prediction(source.arrays, shapes)
    if hinted is None:
        return fitting[0]
    alike = [fit for fit in fitting if fit[0].noise_schedule.prediction_type == hinted]
    if not alike:
        raise ConfigError(
            f"{source.path}: predicts {PREDICTIONS[hinted]}, by {why}, which no configuration of its "
            f"sizes does: give one with --model_config"
        )
    return alike[0][0], f"{alike[0][1]}, for {why}"


def _nearest(shapes: Shapes, known: list[tuple[ModelConfig, str]]) -> str:
    """Why none fits: what is different from the one that differs least."""
    differences = [(list(shapes.differences(config)), name) for config, name in known]
    different, name = min(differences, key=lambda found: len(found[0]))
    return (
        f"no configuration in configs/ fits it, the nearest is {name}: {different[0]}; give one with "
        f"--model_config, if the file is whole"
    )


def hinted_prediction(arrays: Arrays, shapes: Shapes) -> tuple[str | None, str]:
    """What a single file of Stable Diffusion 2 lets one suspect of its UNet's prediction, and by what."""
    said = getattr(arrays, "metadata", {}).get("modelspec.prediction_type")  # of kohya's trainers
    if said in ("epsilon", "v", "v_prediction"):
        return ("epsilon" if said == "epsilon" else "v_prediction"), "what its metadata says"
    if "v_pred" in arrays:
        return "v_prediction", "the mark v_pred in it"
    found = shapes.entries(LAST_NORM)
    if not found or arrays.shape(found[0]) != (320,) or shapes.of(POSITIONS) != (77, 1024):
        return None, ""
    # ComfyUI's rule for published models: in those that predict v these 320 numbers spread more
    spread = float(np.asarray(arrays[found[0]], np.float64).std())
    return ("v_prediction" if spread > 0.09 else "epsilon"), f"the spread {spread:.3f} of a norm in it"


def other_prediction(config: ModelConfig) -> str | None:
    """A configuration beside the program that differs in what the UNet predicts, but not in its shapes."""
    for name in configurations():
        other = read_model_config(name)
        if (
            key_shapes(other) == key_shapes(config)
            and other.noise_schedule.prediction_type != config.noise_schedule.prediction_type
        ):
            return name
    return None


def _require_shapes(source: Source, config: ModelConfig, name: str) -> None:
    shapes = Shapes(source.arrays)
    different = list(shapes.differences(config))
    if not different:
        return
    if reason := what_it_is(source.arrays):
        raise ConfigError(f"{source.path}: {reason}")
    others = [other for other in configurations() if shapes.fit(read_model_config(other))]
    hint = f"{others[0]} fits, or leave the choice to the program" if others else "is anything missing in it?"
    raise ConfigError(
        f"{source.path}: does not match the model configuration {name}: {different[0]}"
        f"{f' (and {len(different) - 1} more)' if len(different) > 1 else ''}; {hint}"
    )


def _require_fit(source: Source, config: ModelConfig, name: str, stated: ModelConfig | None) -> None:
    if stated:
        for field, theirs in _facts(stated).items():
            if (ours := _facts(config)[field]) != theirs:
                raise ConfigError(
                    f"{source.path}: its {field} is {theirs}, that of {name} is {ours}: leave the "
                    f"configuration out, or correct it"
                )
    _require_shapes(source, config, name)


def _require_schedule(source: Source, config: ModelConfig, name: str) -> None:
    if "alphas_cumprod" in source.arrays:
        theirs = np.asarray(source.arrays["alphas_cumprod"], np.float64)
        ours = NoiseSchedule(config.noise_schedule).alphas_cumprod
        if theirs.shape != ours.shape or np.abs(theirs - ours).max() > 5e-3:  # bfloat16 rounds by 4e-3
            raise ConfigError(f"{source.path}: was trained with another noise schedule than that of {name}")


def _facts(config: ModelConfig) -> dict:
    """What no shape tells, and a wrong value of which draws rubbish."""
    noise, unet, text = config.noise_schedule, config.unet, config.text_encoder
    return {
        "prediction_type": noise.prediction_type,
        "beta_start": noise.beta_start,
        "beta_end": noise.beta_end,
        "timesteps": noise.timesteps,
        "latent scale_factor": config.autoencoder.scale_factor,
        "heads in the UNet": [unet.heads(unet.model_channels * mult) for mult in unet.channel_mult],
        "heads in the text encoder": text.heads,
        "activation in the text encoder": text.activation,
        "padding of prompts": text.padding,
        "norm groups": (unet.norm_groups, config.autoencoder.norm_groups),
        "levels with attention": [
            2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))
        ],
    }
