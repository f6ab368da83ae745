"""Write a checkpoint like the official one of 2023: its 1,226 names, shapes and dtypes, random values.

To try what needs its size.

    python scripts/faults/random_checkpoint.py models/random_sd_v2_base.ckpt        # 5.1 GB, by
    mindspore.save_checkpoint

The 12 entries more than the network has are of the text encoder's last layer; its two embeddings are float16.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ldm.command_line import Ending
from ldm.config import read_model_config
from ldm.versions import VERSIONS

LAST = "cond_stage_model.transformer.transformer_layer.resblocks.{}."


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Of the size that keeps activations near 1: norms near the identity, small biases, weights by their
    number of inputs.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    if name.endswith("gamma"):
        return np.ones(shape, np.float32)
    scale = 0.02 if len(shape) == 1 or "embedding" in name else 0.5 / np.sqrt(np.prod(shape[1:]))
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(
        np.float16 if "embedding" in name else np.float32
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("-v", "--version", choices=tuple(VERSIONS), default="2.0", help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with Ending("random_checkpoint.py"):
        if options.target.exists():
            raise FileExistsError(f"{options.target}: exists already; give another name or remove it")
    import mindspore as ms

    from ldm.networks.latent_diffusion import build_model

    config = read_model_config(ROOT / VERSIONS[options.version].model_config)
    shapes = {parameter.name: tuple(parameter.shape) for parameter in build_model(config).get_parameters()}
    layers = config.text_encoder.layers
    # of Stable Diffusion 1 all layers are used
    for name, shape in list(shapes.items()) if options.version[0] == "2" else ():
        if name.startswith(LAST.format(layers - 1)):
            shapes[name.replace(LAST.format(layers - 1), LAST.format(layers))] = shape
    entries = [
        {"name": name, "data": ms.Tensor(values(name, shape, options.seed))}
        for name, shape in tqdm(shapes.items(), "values", unit="entry", disable=None)
    ]
    options.target.parent.mkdir(parents=True, exist_ok=True)
    ms.save_checkpoint(entries, str(options.target))
    print(f"{options.target}: {len(entries)} entries, {options.target.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
