"""Started by test_ranks.py under mpirun: four float16 updates, with an infinite latent on rank 1 in the
second. Prints what happened.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import SHALLOW, in_half, random_model  # noqa: I001
import numpy as np
from mindspore import Tensor
from trainings import OPTIONS, make_inputs, make_samples

from ldm.ranks import join
from ldm.device import start_device
from ldm.training.trainer import build_trainer


def main() -> None:
    ranks = join(start_device("CPU", 0), use_parallel=True)
    config, options = in_half(SHALLOW), dataclasses.replace(OPTIONS, use_parallel=True, init_loss_scale=512)
    with tempfile.TemporaryDirectory() as folder:
        samples, model = make_samples(Path(folder), options), random_model(config)
        inputs = make_inputs(model, config, options, samples)
        trainer = build_trainer(model, inputs, options, config, ranks)
        sound, skipped = inputs.batch, []
        for step in range(4):
            broken = step == 1 and ranks.rank == 1

            def batch(samples, broken=broken):
                latents, *rest = sound(samples)
                return Tensor(np.full(latents.shape, np.inf, np.float32)) if broken else latents, *rest

            inputs.batch = batch
            skipped.append(trainer.one_update()[2])
        digest = hashlib.sha256(
            b"".join(parameter.asnumpy().tobytes() for parameter in trainer.masters.trained)
        ).hexdigest()
        trainer.require_equal_weights()
    print(
        json.dumps(
            {"rank": ranks.rank, "skipped": skipped, "scale": trainer.loss_scale.value, "digest": digest}
        ),
        flush=True,
    )


main()
