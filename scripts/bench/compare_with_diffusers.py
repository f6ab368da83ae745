"""Full-size UNet, forward pass: this project against diffusers with the same random weights, each in its own
process.

    python scripts/bench/compare_with_diffusers.py

Prints the largest difference, the seconds of each (median, first run left out) and the peak resident memory
of each. Needs requirements-test.txt and about 12 GB of memory; takes some minutes. Nothing else should run
meanwhile.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ldm.config import read_model_config


def inputs(config, batch: int):
    rng = np.random.default_rng(0)
    side = config.image_size // config.autoencoder.downsampling
    x = rng.standard_normal((batch, config.unet.in_channels, side, side)).astype(np.float32)
    t = rng.integers(0, 1000, batch).astype(np.int32)
    return (
        x,
        t,
        rng.standard_normal((batch, config.text_encoder.context_length, config.unet.context_dim)).astype(
            np.float32
        ),
    )


def unet_weights(model):
    """Official name to a random array, the same in both processes, one at a time to save memory."""
    for parameter in model.unet.get_parameters():
        rng = np.random.default_rng([parameter.size, sum(parameter.name.encode())])
        values = rng.standard_normal(parameter.shape, dtype=np.float32)
        scale = 1 / np.sqrt(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.1
        yield parameter, values * scale + parameter.name.endswith("gamma")


def run_ours(config, batch: int):
    import mindspore as ms

    from ldm.networks.latent_diffusion import build_model

    ms.set_context(mode=ms.GRAPH_MODE)
    model = build_model(config)
    for parameter, values in unet_weights(model):
        parameter.set_data(ms.Tensor(values.astype(np.float32)))
    tensors = [ms.Tensor(array) for array in inputs(config, batch)]
    return lambda: model.unet(*tensors).asnumpy()


def run_diffusers(config, batch: int):
    import torch
    from diffusers import UNet2DConditionModel

    from ldm.networks.latent_diffusion import build_model
    from ldm.weights.diffusers_folder import diffusers_configs
    from ldm.weights.diffusers_names import diffusers_names

    unet = UNet2DConditionModel.from_config(diffusers_configs(config)["unet"]).eval()
    parameters = dict(unet.named_parameters())
    for parameter, values in unet_weights(build_model(config)):
        parameters[diffusers_names(parameter.name, config)[1][0]].data.copy_(
            torch.from_numpy(values.astype(np.float32))
        )
    x, t, context = (torch.from_numpy(array) for array in inputs(config, batch))

    def forward():
        with torch.no_grad():
            return unet(x, t.long(), context).sample.numpy()

    return forward


def measure(side: str, options) -> None:
    """In the child process: run, save the output, print the figures as JSON."""
    config = read_model_config(options.config)
    forward = {"ours": run_ours, "diffusers": run_diffusers}[side](config, options.batch)
    seconds = []
    for _ in range(options.runs + 1):
        start = time.perf_counter()
        output = forward()
        seconds.append(time.perf_counter() - start)
    np.save(options.child, output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"first": seconds[0], "seconds": float(np.median(seconds[1:])), "peak_gb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/train_dreambooth_sd_v2.yaml")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--runs", type=int, default=3, help="timed runs of each, after the first [%(default)s]"
    )
    parser.add_argument("--side", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return measure(options.side, options)
    outputs, figures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("ours", "diffusers"):
            file = Path(folder) / f"{side}.npy"
            arguments = [f"--config={options.config}", f"--batch={options.batch}", f"--runs={options.runs}"]
            child = subprocess.run(
                [sys.executable, __file__, f"--side={side}", f"--child={file}", *arguments],
                stdout=subprocess.PIPE,
                check=True,
            )
            figures[side], outputs[side] = json.loads(child.stdout.splitlines()[-1]), np.load(file)
            print(
                f"{side:>10}: {figures[side]['seconds']:.2f} s (first run {figures[side]['first']:.1f} s), "
                f"{figures[side]['peak_gb']:.1f} GB peak"
            )
    difference, largest = (
        np.abs(a).max() for a in (outputs["ours"] - outputs["diffusers"], outputs["diffusers"])
    )
    ratio = figures["ours"]["seconds"] / figures["diffusers"]["seconds"]
    print(
        f"max |a - b| {difference:.2e}, relative to max |b| {difference / largest:.2e}; time ratio "
        f"{ratio:.2f}"
    )


if __name__ == "__main__":
    main()
