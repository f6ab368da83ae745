"""Started by test_ranks.py under mpirun: four float16 updates, with an infinite latent on rank 1 in the second. Prints what happened."""

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
from trainings import OPTIONS, make_data

from ldm.training.latent_cache import Encoding
from ldm.ranks import join
from ldm.device import start_device
from ldm.training.trainer import Trainer


def main() -> None:
    ranks = join(start_device("CPU", 0))
    config, options = in_half(SHALLOW), dataclasses.replace(OPTIONS, use_parallel=True, init_loss_scale=512)
    with tempfile.TemporaryDirectory() as folder:
        data, model = make_data(Path(folder), options), random_model(config)
        trainer = Trainer(model, config, options, data, Encoding(model.first_stage_model, data), ranks)
        sound, skipped = trainer.batch, []
        for step in range(4):
            broken = step == 1 and ranks.rank == 1

            def batch(draws, broken=broken):
                latents, *rest = sound(draws)
                return Tensor(np.full(latents.shape, np.inf, np.float32)) if broken else latents, *rest

            trainer.batch = batch
            skipped.append(trainer.one_update()[2])
        digest = hashlib.sha256(b"".join(parameter.asnumpy().tobytes() for parameter in trainer.parameters)).hexdigest()
        trainer.require_equal_weights()
    print(json.dumps({"rank": ranks.rank, "skipped": skipped, "scale": trainer.loss_scale.value, "digest": digest}), flush=True)


main()
