"""A training step for an Ascend that is not there: its device memory, and the kernels that it starts.

    python scripts/dry_run/training_step.py --precision float16

At full size it takes two minutes and 6 GB here. Further flags are those of train_dreambooth.py.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
UPDATES = 2  # in the first one memory is still being taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--soc", default="Ascend910B2", help="CANN's name of the device [%(default)s]")
    parser.add_argument("--ranks", type=int, default=1, help="processes, of which this is the first [1]")
    parser.add_argument("--all", action="store_true", help="all operators, not the 20 most frequent ones")
    parser.add_argument("--json", action="store_true", help="all that is found out, as JSON")
    given, rest = parser.parse_known_args()
    if "DRY_RUN_SOC" in os.environ:
        return step(rest, given.ranks)
    from dry_run import run_counted

    several = {"RANK_SIZE": str(given.ranks), "RANK_ID": "0", "DEVICE_ID": "0"} if given.ranks > 1 else {}
    done, kernels = run_counted([__file__, *sys.argv[1:]], given.soc, **several)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}")
    memory = json.loads(done.stdout.splitlines()[-1])
    launches = {name: number / UPDATES for name, number in kernels.launches.items()}
    if given.json:
        found = {"memory": memory, "launches": launches, "kinds": kernels.kinds, "on_cpu": kernels.on_cpu}
        return print(json.dumps(found))
    print(", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items()))
    total, new, old = sum(launches.values()), kernels.count("aclnn"), kernels.count("aclop")
    print(f"{total:g} launches an update: {new / UPDATES:g} aclnn, {old / UPDATES:g} aclop")
    print("without a kernel for an Ascend:", ", ".join(kernels.on_cpu) or "none")
    for name, number in list(launches.items())[: None if given.all else 20]:
        print(f"{number:6g} {name} {kernels.kinds.get(name, '')}")


def step(flags: list[str], size: int) -> None:
    """In the process that runs dry: build, compile, "run" two updates, and say how much memory they take."""
    import mindspore as ms
    from mindspore.nn.utils import no_init_parameters

    from ldm.command_line import collect, make_parser
    from ldm.config import read_model_config
    from ldm.device import start_device
    from ldm.networks.latent_diffusion import build_model
    from ldm.options import TrainOptions
    from ldm.precision import settle_precision
    from ldm.ranks import Ranks
    from ldm.training.lora import plan_lora
    from ldm.training.trainer import build_trainer

    known = vars(make_parser(TrainOptions).parse_args(flags))
    options = TrainOptions(**{"train_batch_size": 1} | collect(TrainOptions, known, "command line"))
    named = options.model_config if options.model_config != "auto" else "configs/train_dreambooth_sd_v2.yaml"
    config = read_model_config(named)
    start_device("Ascend", 0)
    precision = settle_precision(options.precision, config.precision, is_forced=True)
    config = dataclasses.replace(config, precision=precision)
    options = options.for_model(config)
    if size > 1:
        from mindspore import communication

        communication.init()
    model = build_model(config, fuses_attention=options.flash_attention != "off")
    options, lora = plan_lora(options, config, model)
    model.take_out_frozen(options.trains_text)
    with no_init_parameters():
        trainer = build_trainer(model, Zeros(options, config), options, config, Ranks(0, size), lora)
    for _ in range(UPDATES):
        trainer.one_update()
    memory = ms.runtime.memory_stats()
    names = {
        "peak": "max_allocated_memory",
        "peak reserved": "max_reserved_memory",
        "kept": "total_allocated_memory",
    }
    print(json.dumps({name: memory[key] for name, key in names.items()}), flush=True)
    os._exit(0)  # how the stubs end is nobody's concern


class Zeros:
    """Batches of the shapes that a training has."""

    def __init__(self, options, config) -> None:
        import numpy as np
        from mindspore import Tensor

        count = options.train_batch_size * (2 if options.with_prior_preservation else 1)
        side = options.image_size // config.autoencoder.downsampling
        latents = Tensor(np.zeros((count, config.unet.in_channels, side, side), np.float32))
        length, width = config.text_encoder.context_length, config.unet.context_dim
        text = np.zeros((count, length), np.int32)
        if not options.trains_text:
            text = np.zeros((count, length, width), np.float32)
        self.batch = latents, Tensor(text), Tensor(np.zeros(count, np.int32)), latents
        self.weighs = options.min_snr_gamma is not None or options.masked_loss
        if self.weighs:
            places = (side, side) if options.masked_loss else (1, 1)
            self.batch += (Tensor(np.zeros((count, 1, *places), np.float32)),)

    def batches(self, size, count, *_):
        return iter([self.batch] * count)


if __name__ == "__main__":
    main()
