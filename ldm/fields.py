"""What the fields of an option class say, and what both classes have in common: ldm/options.py and
ldm/sample_options.py. Must not import mindspore.

A dataclass field is the flag, the key of a configuration file, the type, the default and the help, at once;
and it says what depends on it. `ldm.command_line` turns flags and files into these objects.
"""

import shlex
from collections.abc import Sequence
from dataclasses import Field, field
from pathlib import Path

from ldm.config import PROGRAM
from ldm.values import ConfigError, absent, nearest
from ldm.versions import VERSIONS

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
SAMPLER_NAMES = ("plms", "ddim", "dpm_solver", "dpm_solver_pp", "uni_pc")
TIMESTEPS = 1000  # of the noise schedule of every Stable Diffusion: no sampler takes more
DEVICES = ("auto", "Ascend", "CPU")
SAVE_FORMATS = ("mindspore", "safetensors", "stability", "diffusers")
LORA_TARGETS = ("attention", "feed_forward", "projections", "convolutions")
LORA_FORMATS = ("kohya", "diffusers")
CAPTIONS = ("none", "text_files", "file_names", "table")
IMAGE_FORMATS = ("png", "jpg", "webp")
IMAGE_FITS = ("crop", "pad")
LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
# what each keeps from update to update, in values for each that is trained; adafactor one a row and column
OPTIMIZERS = {"adamw": 2.0, "adam": 2.0, "adafactor": 0.01, "lion": 1.0, "prodigy": 4.0}
SAVE_DTYPES = ("float32", "float16", "bfloat16")
PRECISION_HELP = "of all products; auto: as the YAML says, else float16 on Ascend, float32 on a CPU"
FORCE_PRECISION_HELP = "take a precision that the device does not compute in"
FLASH_ATTENTION_HELP = "attention in one kernel where the device has it (Atlas A2, A3), or off"
DETERMINISTIC_HELP = "on Ascend: the same bits in every run, at some speed [exchanges between devices only]"
VERSION_HELP = "1.4, 1.5, 2.0, 2.0-v, 2.1 or 2.1-v: chooses YAML and published file in models/ [by the file]"


def option(  # noqa: PLR0913 (a field says a lot)
    default, group: str, text: str, *, aliases: Sequence[str] = (), choices: Sequence = (), metavar: str = "",
    least=None, most=None, above=None, below=None, shapes_graph: bool = True,
    changes_result: bool = True,
):  # fmt: skip
    """A field with what its flag needs.

    Args:
        text: for --help, where the default follows in brackets unless the text ends with brackets of its own.
            Empty: the option is not shown.
        least, most, above, below: bounds.
        shapes_graph: a compiled graph of the training may depend on it; else the graphs are shared.
        changes_result: the weights that a training ends with depend on it; else it may differ when a run is
            resumed. Files and folders are False: their contents are compared.
    """
    return field(default=default, metadata=dict(
        group=group, text=text, aliases=aliases, choices=choices, metavar=metavar, least=least, most=most,
        above=above, below=below, shapes_graph=shapes_graph, changes_result=changes_result,
    ))  # fmt: skip


def run_option(default, group: str, text: str, **more):
    """About the run, not about what is computed; or the path of a file, whose content is compared."""
    return option(default, group, text, shapes_graph=False, changes_result=False, **more)


def value_option(default, group: str, text: str, **more):
    """A value that graphs take as an input, or that decides which inputs they get."""
    return option(default, group, text, shapes_graph=False, **more)


def came_later(spec: Field) -> bool:
    """Whether states of older versions do not know an option: they were made as by its default."""
    return spec.metadata["group"] in ("captions", "recipes")


def require_weights(path: Path, hint: str) -> None:
    if not path.exists():
        raise ConfigError(f"checkpoint {path}: {absent(path, 'no such file or folder')}; {hint}")


def beside_program(path: str) -> str:
    """A path of this program's as one types it where one is, for a command to try."""
    return path if Path.cwd() == PROGRAM else shlex.quote(str(PROGRAM / path))


def check_version(version: str | None) -> None:
    if version not in (None, *VERSIONS):
        raise ConfigError(f"SD_VERSION must be one of {', '.join(VERSIONS)}, got {version!r}")


def lora_target_names(given: str) -> tuple[str, ...]:
    """`attention+feed_forward` as names of LORA_TARGETS; before a leading + stands attention.

    Raises ConfigError for another name.
    """
    names = tuple(name.strip() or "attention" for name in given.split("+"))
    if unknown := sorted(set(names) - set(LORA_TARGETS)):
        raise ConfigError(
            f"lora_targets must be some of {', '.join(LORA_TARGETS)} with + between them, got "
            f"{unknown[0]!r}{nearest(unknown[0], list(LORA_TARGETS))}"
        )
    return names


def check_folders(instance_data_dir: str, class_data_dir: str | None, output_path: str) -> None:
    """Raises ConfigError where the folders of a training are none, or lie in each other so that images and
    results would mix.
    """
    instance, output = Path(instance_data_dir), Path(output_path)
    if not instance.is_dir():
        what = "must be a folder, got a file" if instance.exists() else "no such folder"
        raise ConfigError(f"instance_data_dir {instance_data_dir}: {what}")
    if _lies_in(output, instance) or _lies_in(instance, output):
        raise ConfigError(
            f"output_path {output_path} must lie apart from instance_data_dir {instance_data_dir}, which is "
            f"only read: give another folder"
        )
    if class_data_dir is None:
        return
    classes = Path(class_data_dir)
    if _lies_in(classes, instance):
        raise ConfigError(
            f"class_data_dir {class_data_dir} lies in instance_data_dir: give a folder of its own"
        )
    if _lies_in(output, classes):
        raise ConfigError(
            f"output_path {output_path} lies in class_data_dir {class_data_dir}, among the images: give "
            f"another folder"
        )
    if classes.exists() and not classes.is_dir():
        raise ConfigError(f"class_data_dir {class_data_dir} must be a folder, got a file")


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is that of the folder, or of anything in it, by whatever links."""
    return path.resolve().is_relative_to(folder.resolve())
