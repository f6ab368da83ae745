"""Write a LoRA of any program anew, under the names that others read.

    python scripts/convert_lora.py SOURCE TARGET.safetensors [--lora_format kohya|diffusers]

SOURCE is a file, say a .ckpt of mindone or one of diffusers, or a folder of PEFT's. What it was trained on is
told by its shapes, unless --version or --config says it. Nothing that exists is overwritten.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.command_line import Ending, home_path, start_logging
from ldm.config import ModelConfig, read_model_config
from ldm.fields import LORA_FORMATS, SAVE_DTYPES
from ldm.versions import VERSIONS, configurations


def open_lora(source: Path, given: list[str]):
    """The LoRA, and the configuration of its model: the first of `given` that it fits.

    Raises the ValueError of the first one, where it fits none.
    """
    from ldm.networks.latent_diffusion import build_model
    from ldm.weights.lora_files import read_lora
    from ldm.weights.lora_merge import require_same_version
    from ldm.weights.lora_units import units_of

    error = None
    for name in given:
        config = read_model_config(name)
        try:
            lora = read_lora(source, units_of(build_model(config).parameter_shapes(), config))
            require_same_version(lora, config)
        except ValueError as found:
            error = error or found
            continue
        print(f"{lora.path}: {len(lora.pairs)} additions of rank {lora.ranks()}, for {name}")
        return lora, config
    raise error


def convert(options: argparse.Namespace) -> None:
    from ldm.device import require_versions

    require_versions()
    from ldm.weights.lora_merge import own_metadata

    require_new(options.target)
    given = [options.config] if options.config else configurations()
    given = [VERSIONS[options.version].model_config] if options.version else given
    lora, config = open_lora(options.source, given)
    write(lora, config, own_metadata(lora), options)
    print(f"{options.target}: {options.lora_format}, {options.dtype}")


def require_new(target: Path) -> None:
    """Raises ValueError or FileExistsError where no LoRA can be written there."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: must end with .safetensors")
    if target.exists():
        raise FileExistsError(f"{target}: exists already; give another name or remove it")


def write(lora, config: ModelConfig, own: Mapping, options: argparse.Namespace) -> None:
    """Write a LoRA as `add_writing_options` say, with its own texts and those of `texts_of`."""
    from ldm.weights.lora_writing import texts_of, write_lora
    from ldm.weights.writing import DTYPES

    sizes = {name: (pair.rank, pair.alpha) for name, pair in lora.pairs.items()}
    write_lora(
        lora.pairs, lora.units, options.target, options.lora_format, DTYPES[options.dtype],
        lora.metadata | texts_of(config, sizes, own), replace=False,
    )  # fmt: skip


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=home_path, help="what to write: NAME.safetensors")
    parser.add_argument("--lora_format", choices=LORA_FORMATS, default="kohya", help="names [%(default)s]")
    parser.add_argument(
        "--dtype", choices=SAVE_DTYPES, default="float16", help="of the numbers [%(default)s]"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=home_path, help="a LoRA, or a folder of PEFT's")
    add_writing_options(parser)
    parser.add_argument("-v", "--version", choices=tuple(VERSIONS), help="of its model [by its shapes]")
    parser.add_argument("--config", help="configuration of its model [the first that fits]")
    options = parser.parse_args(argv)
    start_logging("INFO")
    with Ending("convert_lora.py"):
        convert(options)


if __name__ == "__main__":
    main()
