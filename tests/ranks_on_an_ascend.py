"""Started by test_ranks.py under mpirun: two processes do on a CPU what an Ascend may do to them. Prints what
happened.

First rank 1 alone sees an overflow, as the first Ascend 910 tells it: by a register of the device, with
gradients that are the same everywhere. Then the weights of rank 1 differ in their last bits, then in more.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import SHALLOW, in_half, random_model  # noqa: I001
import mindspore as ms
import numpy as np
from trainings import OPTIONS, make_inputs, make_samples

from ldm.device import start_device
from ldm.ranks import join
from ldm.training.trainer import build_trainer


def main() -> None:
    ranks = join(start_device("CPU", 0), use_parallel=True)
    config, options = (
        in_half(SHALLOW),
        dataclasses.replace(OPTIONS, use_parallel=True, train_text_encoder=False),
    )
    if ranks.rank == 1:
        ms.amp.all_finite = never_finite
    with tempfile.TemporaryDirectory() as folder:
        samples, model = make_samples(Path(folder), options), random_model(config)
        trainer = build_trainer(model, make_inputs(model, config, options, samples), options, config, ranks)
        found = {"rank": ranks.rank, "skipped": trainer.one_update().skipped}
    trainer.mends_last_bits = True
    weight, moment = trainer.masters.trained[0], trainer.optimizer.adam_m[0]
    values, moments = weight.asnumpy().copy(), moment.asnumpy().copy()
    if ranks.rank == 1:
        weight.set_data(ms.Tensor(np.nextafter(values, np.float32(9))))
        moment.set_data(ms.Tensor(moments + 1))
    trainer.agree_on_weights()
    found["mended"] = bool((weight.asnumpy() == values).all() and (moment.asnumpy() == moments).all())
    trainer.mends_last_bits = ranks.size == 1
    trainer.agree_on_weights()  # bit by bit
    trainer.mends_last_bits = True
    if ranks.rank == 1:
        weight.set_data(ms.Tensor(values * 1.1))
    try:
        trainer.agree_on_weights()
    except ValueError as error:
        found["refused"] = str(error)
    print(json.dumps(found), flush=True)


def never_finite(gradients):
    return ms.Tensor(False)


main()
