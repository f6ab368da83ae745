"""Convert a model of Stable Diffusion 1.4 to 2.1 from any format into any other.

    python scripts/convert_checkpoint.py SOURCE TARGET [--to mindspore|safetensors|stability|diffusers]

SOURCE is a file (MindSpore's .ckpt, safetensors, a Stability or CompVis .ckpt) or a folder of diffusers. What
TARGET becomes follows from its name: NAME.ckpt is MindSpore's format, NAME.safetensors one file with the
names that AUTOMATIC1111, ComfyUI and diffusers' from_single_file read (--to safetensors: with MindSpore's
names), NAME a folder of diffusers. Nothing that exists is overwritten.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.command_line import Ending, home_path, progress_bar, start_logging
from ldm.config import ModelConfig
from ldm.fields import SAVE_DTYPES, SAVE_FORMATS
from ldm.versions import VERSIONS
from ldm.weights.arrays import Arrays, cast
from ldm.weights.choice import choose_config
from ldm.weights.source import Source, open_weights


class Checked(Arrays):
    """Arrays that are cast, found finite, and counted as they are read."""

    def __init__(self, arrays: Arrays, dtype, read: Callable[[], None]) -> None:
        self._arrays, self._dtype, self._read = arrays, dtype, read

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays.shape(name)

    def dtype(self, name: str):
        return self._dtype

    def __getitem__(self, name: str):
        from ldm.weights.arrays import is_finite

        values = self._arrays[name]
        result = cast(values, self._dtype)
        if not is_finite(result):
            reason = f"values too large for {self._dtype}" if is_finite(values) else "NaN or Inf"
            raise ValueError(f"{name} has {reason}")
        self._read()
        return result

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def open_whole(path: Path, options: argparse.Namespace) -> tuple[Arrays, dict[str, tuple[int, ...]], Source]:
    """A model's arrays by official names, each read when it is asked for; their shapes; and the source, with
    its configuration.

    Raises ValueError where it is not a whole model.
    """
    from ldm.device import require_versions

    require_versions()
    from ldm.networks.latent_diffusion import build_model
    from ldm.weights.checkpoint import require_match, say_what_is_left_out
    from ldm.weights.layouts import fit

    opened = open_weights(path, options.variant, options.use_ema_weights)
    source = choose_config(opened, options.config, options.version)
    print(f"{source.path}: {source.known_by}")
    shapes = build_model(source.config).parameter_shapes()
    arrays = fit(source.arrays, shapes, source.config, options.use_ema_weights and source.configs is None)
    require_match(shapes, arrays, source.arrays, str(source.path))
    say_what_is_left_out(arrays, str(source.path))
    return arrays, shapes, source


def convert(options: argparse.Namespace) -> None:
    format_to_write(options.target, options.to)
    arrays, _, source = open_whole(options.source, options)
    write(arrays, source.config, options.target, options.to, options.dtype)


def format_to_write(target: Path, to: str | None) -> str:
    """What a target becomes, which is not there yet. Raises ValueError or FileExistsError."""
    from ldm.weights.writing import SUFFIXES, format_of

    if target.exists():
        raise FileExistsError(f"{target}: exists already; give another name or remove it")
    if to is None:
        return {"safetensors": "stability"}.get(kind := format_of(target), kind)
    if to != "diffusers" and target.suffix != SUFFIXES[to]:
        raise ValueError(f"{target}: must end with {SUFFIXES[to]} for --to {to}")
    if to == "diffusers" and target.suffix in SUFFIXES.values() and target.suffix:
        raise ValueError(f"{target}: --to diffusers makes a folder: give a name without {target.suffix}")
    return to


def write(arrays: Arrays, config: ModelConfig, target: Path, to: str | None, dtype: str) -> None:
    """Write a whole model, with a progress bar, and read it back."""
    from ldm.weights.writing import DTYPES, save_weights

    to = format_to_write(target, to)
    with progress_bar("writing", unit="array")(len(arrays)) as bar:
        checked = Checked(arrays, DTYPES[dtype], bar.update)
        # what is recorded in a run's folder is the run's own, and goes with its older checkpoints
        record = not any((target.parent / name).exists() for name in ("run.json", "effective_config.json"))
        save_weights(checked, target, record, to=to, config=config, compare=True, replace=False)
    print(f"{target}: {len(arrays)} parameters, {to}, {dtype}")


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=home_path, help="what to write")
    parser.add_argument("--to", choices=SAVE_FORMATS, help="format and names of the target [by its name]")
    parser.add_argument(
        "--dtype", choices=SAVE_DTYPES, default="float32", help="of the numbers [%(default)s]"
    )
    parser.add_argument("--config", default="auto", help="model configuration [the one that fits]")


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", help="of the files in a folder: fp16, bf16, non_ema [the plain ones]")
    parser.add_argument(
        "-v", "--version", choices=tuple(VERSIONS), help="Stable Diffusion version [by the file]"
    )
    parser.add_argument("--use_ema_weights", action="store_true", help="take the averages in the source")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=home_path, help="a weight file or a folder of diffusers")
    add_writing_options(parser)
    add_reading_options(parser)
    options = parser.parse_args(argv)
    start_logging("INFO")
    with Ending("convert_checkpoint.py"):
        convert(options)


if __name__ == "__main__":
    main()
