"""Model configuration, and how values from JSON and YAML files are read and converted.

Must not import mindspore.
"""

import dataclasses
import io
import logging
import os
import typing
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasEvent, YAMLError, parse

from ldm.mindone_config import from_mindone, is_mindone
from ldm.text_files import NotText, read_text
from ldm.values import ConfigError, nearest, parse_value, require_file

PROGRAM = Path(__file__).resolve().parents[1]
LARGEST_CONFIGURATION = 2**20  # bytes
# fields that came with Stable Diffusion 1 and 2.1, and with recipes: a state of before has not got them
SINCE_VERSIONS = {
    "num_heads", "use_linear_projection", "upcast_attention", "activation", "padding", "zero_terminal_snr",
}  # fmt: skip
# what the readers raise at a damaged file
UNREADABLE = (
    YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, AttributeError, RecursionError,
)  # fmt: skip
ENDS_IN_NOISE = (
    "zero_terminal_snr needs a model that predicts v (2.0-v, 2.1-v): one that predicts the noise has nothing "
    "to find in pure noise"
)
PRECISIONS = ("auto", "float32", "float16", "bfloat16")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the denoising network. `context_dim` is the text encoder's width.

    Attention has `num_heads` heads everywhere (Stable Diffusion 1), or heads of `head_channels` channels
    (Stable Diffusion 2): one of the two. `use_linear_projection`: linear layers around a transformer, not 1x1
    convolutions. `upcast_attention`: scores are float32 even where compute is float16, in which those of
    2.1 overflow.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    head_channels: int | None
    context_dim: int
    norm_groups: int = 32
    dropout: float = 0.0
    num_heads: int | None = None
    use_linear_projection: bool = True
    upcast_attention: bool = False

    def heads(self, channels: int) -> int:
        """Of an attention over so many channels."""
        return self.num_heads or channels // self.head_channels


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the VAE. `scale_factor` brings its latents to unit variance."""

    image_channels: int
    latent_channels: int
    base_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    scale_factor: float
    norm_groups: int = 32

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text encoder.

    `layers` counts the layers in use: OpenCLIP ViT-H has 24, SD2 stops after 23. `activation` is `gelu`
    (OpenCLIP) or `quick_gelu` (OpenAI's CLIP, Stable Diffusion 1); `padding` of a prompt is `zero` (OpenCLIP)
    or the `end` mark (Stable Diffusion 1).
    """

    vocab_size: int
    context_length: int
    width: int
    heads: int
    layers: int
    activation: str = "gelu"
    padding: str = "zero"


@dataclass(frozen=True)
class ScheduleConfig:
    """The scaled-linear noise schedule and what the UNet predicts: `epsilon` or `v_prediction`; and whether
    the schedule is rescaled to end in pure noise (Lin et al. 2024).
    """

    timesteps: int
    beta_start: float
    beta_end: float
    prediction_type: str
    zero_terminal_snr: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """All that fixes the three networks.

    `precision`: what they compute in, on float32 weights: float32, float16 or bfloat16; `auto`: what suits
    the device (ldm.precision.settle_precision).
    """

    image_size: int
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    text_encoder: TextEncoderConfig
    noise_schedule: ScheduleConfig
    precision: str = "auto"

    def facts(self) -> dict:
        """All values, but for those that newer versions of this program know and that are as they always
        were. Saved states know the precision as `use_fp16`.
        """
        values = dataclasses.asdict(self)
        if values["precision"] != "bfloat16":
            values["use_fp16"] = values.pop("precision") == "float16"
        parts = {"unet": UNetConfig, "text_encoder": TextEncoderConfig, "noise_schedule": ScheduleConfig}
        for part, cls in parts.items():
            for spec in dataclasses.fields(cls):
                if spec.name in SINCE_VERSIONS and values[part][spec.name] == spec.default:
                    del values[part][spec.name]
        return values

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this, in pixels."""
        return self.autoencoder.downsampling

    def check_size(self, **sides: int) -> None:
        for name, pixels in sides.items():
            if pixels % self.size_multiple:
                raise ConfigError(f"{name} must be a multiple of {self.size_multiple}, got {pixels}")

    def check_steps(self, sampling_steps: int) -> None:
        if sampling_steps > self.noise_schedule.timesteps:
            most = self.noise_schedule.timesteps
            raise ConfigError(f"sampling_steps must be {most} or less for this model, got {sampling_steps}")


def find_configuration(path: str | Path) -> Path:
    """A configuration file: where the path says, else beside this program, as the 2023 example looked for it.

    Raises ConfigError.
    """
    given, beside = Path(os.path.expanduser(path)), PROGRAM / path
    if not given.is_file() and beside.is_file():
        return beside
    there = ", ".join(
        str(file.relative_to(PROGRAM)) for file in sorted(PROGRAM.glob(f"configs/*{given.suffix or '.yaml'}"))
    )
    hint = f"beside the program there are {there}" if there else "check the path"
    require_file(given, "configuration", hint)
    return given


def read_values(path: str | Path) -> dict | list:
    """What a JSON or YAML file holds. Nothing in it is executed. Raises ConfigError."""
    path = find_configuration(path)
    try:
        if Path(path).stat().st_size > LARGEST_CONFIGURATION:
            raise ValueError(f"larger than {LARGEST_CONFIGURATION} bytes")
        text = read_text(path)
        if any(isinstance(event, AliasEvent) for event in parse(text)):  # a few, nested, are gigabytes
            raise ValueError("references (*name) are not read, write the values out")
        if "${" in text:  # these, too, unfold; and some read the environment
            raise ValueError("references (${name}) are not read, write the values out")
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except NotText as error:
        raise ConfigError(str(error)) from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not readable as JSON or YAML: {reason}") from None
    return loaded


def read_mapping(path: str | Path) -> dict:
    """The values of a JSON or YAML file of `key: value` pairs. Raises ConfigError."""
    loaded = read_values(path)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, got a {type(loaded).__name__}")
    return loaded


def _build(cls, given, where: str):
    """A dataclass from a nested mapping, strictly."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must hold `key: value` pairs, got {given!r}")
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}
    for key in given:
        if key not in specs:
            raise ConfigError(f"{where}: unknown key {key}{nearest(str(key), list(specs))}")
    values = {}
    for name, spec in specs.items():
        if name not in given:
            if spec.default is dataclasses.MISSING and type(None) not in typing.get_args(spec.type):
                raise ConfigError(f"{where}: {name} is missing")
            if spec.default is dataclasses.MISSING:
                values[name] = None
        elif dataclasses.is_dataclass(spec.type):
            values[name] = _build(spec.type, given[name], f"{where}: {name}")
        else:
            values[name] = parse_value(given[name], spec.type, f"{where}: {name}")
    return cls(**values)


def check_model_config(config: ModelConfig, source: str) -> ModelConfig:
    """Raise ConfigError where its values do not go together."""
    unet, autoencoder, text = config.unet, config.autoencoder, config.text_encoder
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    wrong = [
        (unet.channel_mult[0] != 1, "unet: channel_mult must begin with 1"),
        (unet.context_dim != text.width,
        f"unet: context_dim {unet.context_dim} is not the text encoder's width {text.width}"),
        (unet.in_channels != autoencoder.latent_channels,
        "unet: in_channels is not the autoencoder's latent_channels"),
        ((unet.head_channels is None) == (unet.num_heads is None),
        "unet: give head_channels or num_heads, one of the two"),
        (any(w % unet.norm_groups or w % (unet.num_heads or unet.head_channels or w) for w in widths),
        f"unet: widths {widths} must divide into norm_groups and heads"),
        (text.activation not in ("gelu", "quick_gelu"),
        "text_encoder: activation must be gelu or quick_gelu"),
        (text.padding not in ("zero", "end"), "text_encoder: padding must be zero or end"),
        (text.width % text.heads != 0,
        f"text_encoder: width {text.width} does not divide into {text.heads} heads"),
        (config.precision not in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}, "
        f"got {config.precision}"),
        (config.noise_schedule.prediction_type not in ("epsilon", "v_prediction"),
        "noise_schedule: prediction_type must be epsilon or v_prediction"),
        (config.noise_schedule.zero_terminal_snr and config.noise_schedule.prediction_type == "epsilon",
        ENDS_IN_NOISE),
        (config.image_size % config.size_multiple != 0,
        f"image_size must be a multiple of {config.size_multiple}, got {config.image_size}"),
        (not 0 <= unet.dropout < 1, f"unet: dropout must be 0 or more and less than 1, got {unet.dropout}"),
    ]  # fmt: skip
    for condition, message in wrong:
        if condition:
            raise ConfigError(f"{source}: {message}")
    return config


def model_config_from(given: dict, source: str) -> ModelConfig:
    """A model configuration from nested values, as `dataclasses.asdict` gives them; `use_fp16`, True or
    False, may stand for `precision`. Raises ConfigError.
    """
    if isinstance(given, dict) and "use_fp16" in given:
        is_half = parse_value(given["use_fp16"], bool, f"{source}: use_fp16")
        implied = {"precision": "float16" if is_half else "float32"}
        if given.get("precision", implied["precision"]) != implied["precision"]:
            raise ConfigError(f"{source}: use_fp16 and precision contradict each other: leave use_fp16 out")
        given = {key: value for key, value in given.items() if key != "use_fp16"} | implied
    return check_model_config(_build(ModelConfig, given, source), source)


def read_model_config(path: str | Path, **sides: int) -> ModelConfig:
    """The model configuration in a YAML or JSON file, this program's or one of mindone's of 2023.

    Args:
        sides: in pixels, of images that the model is to make, by the names of their options.

    Raises:
        ConfigError: it cannot be read, is not consistent, or cannot make images of that size.
    """
    given = read_mapping(path)
    if is_mindone(given):
        try:
            given = from_mindone(given)
        except ValueError as error:
            raise ConfigError(
                f"{path}: a configuration of mindone for other networks than Stable Diffusion 1 and 2 "
                f"({error}); leave it out, and the one that fits the checkpoint is taken"
            ) from None
        logger.warning(
            "%s: in mindone's layout of 2023; its sizes, precision, dropout and noise schedule are taken",
            path,
        )
    config = model_config_from(given, str(path))
    config.check_size(**sides)
    return config
