"""Convert between a diffusers folder and a checkpoint with the official names (.ckpt or .safetensors).

    python scripts/convert_checkpoint.py DIFFUSERS_FOLDER CHECKPOINT --config MODEL.yaml
    python scripts/convert_checkpoint.py CHECKPOINT DIFFUSERS_FOLDER --config MODEL.yaml

Which way follows from the source: a folder or a file. Nothing that exists is overwritten.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.command_line import Ending
from ldm.config import read_model_config


def convert(source: Path, target: Path, config_file: Path, half: bool) -> None:
    from ldm.device import require_versions

    require_versions()
    import numpy as np

    from ldm.networks.latent_diffusion import build_model
    from ldm.weights import checkpoint
    from ldm.weights.diffusers_folder import read_diffusers_folder, write_diffusers_folder
    from ldm.weights.diffusers_names import from_diffusers

    if target.exists():
        raise FileExistsError(f"{target}: exists already; give another name or remove it")
    config = read_model_config(config_file)
    model = build_model(config)
    if source.is_dir():
        shapes = {parameter.name: tuple(parameter.shape) for parameter in model.get_parameters()}
        weights = from_diffusers(read_diffusers_folder(source), shapes, config)
    else:
        weights = checkpoint.read_checkpoint(source)
    checkpoint.load_weights(model, weights, str(source))  # strict
    dtype = np.float16 if half else np.float32
    weights = {
        name: value.asnumpy().astype(dtype, copy=False)
        for name, value in checkpoint.weights_of(model).items()
    }
    if source.is_dir():
        checkpoint.save_weights(weights, target, record=True)
    else:
        write_diffusers_folder(target, weights, config)
    print(f"{target}: {len(weights)} parameters")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="diffusers folder or checkpoint file")
    parser.add_argument("target", type=Path, help="what to write")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("configs/train_dreambooth_sd_v2.yaml"),
        help="model configuration [%(default)s]",
    )
    parser.add_argument("--half", action="store_true", help="store float16 instead of float32")
    options = parser.parse_args(argv)
    with Ending("convert_checkpoint.py"):
        convert(options.source, options.target, options.config, options.half)


if __name__ == "__main__":
    main()
