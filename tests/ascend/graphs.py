"""Started by test_dry_run.py: networks of a small model compiled for an Ascend that is not there, run dry.

usage: graphs.py PRECISION GRAPH...     encode, decode, text, guided; of training, compiled only: step, check,
    apply_collected
"""

import dataclasses
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/dry_run")]

import numpy as np  # noqa: E402

from ldm.config import read_model_config  # noqa: E402
from ldm.device import start_device  # noqa: E402

GENERATING = ("encode", "decode", "text", "guided")


def main(precision: str, *graphs: str) -> None:
    start_device("Ascend", 0)
    from mindspore import Tensor, float32
    from training_step import Zeros

    from ldm.networks.autoencoder import Decode, Encode
    from ldm.networks.latent_diffusion import build_model
    from ldm.options import TrainOptions
    from ldm.sampling.text_to_image import Guided
    from ldm.training.trainer import build_trainer

    config = read_model_config(ROOT / "tests/ascend/small.yaml")
    config = dataclasses.replace(config, precision=precision)
    model = build_model(config, initialise=True)

    def zeros(*shape, dtype=np.float32) -> Tensor:
        return Tensor(np.zeros(shape, dtype))

    if graphs[0] in GENERATING:
        model.cast_weights()
    context = zeros(4, 77, config.unet.context_dim)
    calls = {
        "encode": (Encode(model.first_stage_model), zeros(2, 3, 32, 32)),
        "decode": (Decode(model.first_stage_model), zeros(2, 4, 16, 16)),
        "text": (model.cond_stage_model, zeros(2, 77, dtype=np.int32)),
        "guided": (
            Guided(model.unet), zeros(2, 4, 16, 16), zeros(4, dtype=np.int32), context, Tensor(9.0, float32)
        ),
    }  # fmt: skip
    for name in graphs:
        if name in calls:
            cell, *inputs = calls[name]
            cell(*inputs)
        else:
            options = TrainOptions(train_batch_size=1, clip_grad=True).for_model(config)
            compile_training(build_trainer(model, Zeros(options, config), options, config), name)
        print(name, "compiled", flush=True)
    os._exit(0)


def compile_training(trainer, name: str) -> None:
    """One of a trainer's graphs."""
    from mindspore import Tensor, float32

    zero = Tensor(0.0, float32)
    scalars = [zero, *trainer.optimizer.scalars(1, 0.0)]
    inputs = {
        "step": [*trainer.inputs.batch, zero, *scalars],
        "check": [zero],
        "apply_collected": [zero, *scalars],
    }
    return getattr(trainer.update, name).compile(*inputs[name])


main(*sys.argv[1:])
