"""Go on with the base training of the tiny model in MindSpore, with train_dreambooth.py's own step, and watch
the held-out loss.

    python scripts/tiny_model/continue_training.py --work DIR --start models/tiny_sd_v2.safetensors --steps
    300

The networks, loss, optimizer, clipping and update are those of DreamBooth; only the class term is left out
and every picture has its own caption. Needs DIR as scripts/tiny_model/train.py leaves it. Prints the loss on
256 pictures that no training has seen, with fixed noise, before, during and after; writes nothing unless
--save names a new file.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ldm.command_line import Ending
from ldm.config import read_model_config
from ldm.device import start_device
from ldm.networks.latent_diffusion import build_model
from ldm.ranks import ALONE
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer
from ldm.training.loss import DreamBoothLoss
from ldm.training.masters import Masters
from ldm.training.optim import AdamW, Trainees
from ldm.training.train_step import Apply, GlobalNorm, TrainStep
from ldm.weights.checkpoint import load_checkpoint, weights_of
from ldm.weights.writing import save_weights

HELD_OUT = 512  # the first pictures, as in train.py
CHECKED = 256


class Samples:
    """Latents, token ids, t and noise of pictures, by their numbers."""

    def __init__(self, work: Path, scale_factor: float) -> None:
        # (pictures, 2, 4, 16, 16): mean and deviation
        self.moments = np.load(work / "moments.npy", mmap_mode="r")
        captions = [fact["caption"] for fact in json.loads((work / "pictures.json").read_text())]
        self.tokens = Tokenizer(77)(["", *captions])
        self.scale_factor = scale_factor

    def __call__(
        self, rows: np.ndarray, rng: np.random.Generator, without_caption: float = 0.0
    ) -> tuple[Tensor, ...]:
        mean, deviation = np.moveaxis(self.moments[np.sort(rows)].astype(np.float32), 1, 0)
        latents = (mean + deviation * rng.standard_normal(mean.shape, np.float32)) * self.scale_factor
        ids = self.tokens[np.where(rng.random(len(rows)) < without_caption, 0, np.sort(rows) + 1)]
        t = rng.integers(1000, size=len(rows)).astype(np.int32)
        return Tensor(latents), Tensor(ids), Tensor(t), Tensor(rng.standard_normal(mean.shape, np.float32))


def train(options: argparse.Namespace) -> None:
    start_device("auto", 0)
    config = read_model_config(ROOT / "configs/train_dreambooth_tiny.yaml")
    model = build_model(config)
    load_checkpoint(model, options.start)
    samples = Samples(options.work, config.autoencoder.scale_factor)
    unet, text_encoder = model.unet.set_train(True), model.cond_stage_model.set_train(True)
    loss = DreamBoothLoss(unet, text_encoder, NoiseSchedule(config.noise_schedule), None)
    for parameter in model.first_stage_model.get_parameters():
        parameter.requires_grad = False
    parameters = [*reversed([*text_encoder.trainable_params(), *unet.trainable_params()])]
    masters = Masters(parameters, joins=False)
    optimizer = AdamW(Trainees.alike(masters.trained, masters.decayed), (0.9, 0.99), 0.01, scales=False)
    step = TrainStep(
        loss, masters, GlobalNorm(True), Apply(masters, optimizer, 1.0), ALONE, collects=False,
        accumulates=False,
    )  # fmt: skip

    def held_out_loss() -> float:
        rng = np.random.default_rng(7)
        starts = range(0, CHECKED, options.batch)
        return float(
            np.mean(
                [float(loss(*samples(np.arange(start, start + options.batch), rng))[0]) for start in starts]
            )
        )

    rng, one = np.random.default_rng(options.seed), Tensor(1.0, mstype.float32)
    print(
        f"| steps | pictures | held-out loss | training loss |\n|---|---|---|---|\n| 0 | 0 | "
        f"{held_out_loss():.4f} | |",
        flush=True,
    )
    losses, begin = [], 0.0
    for number in tqdm(range(1, options.steps + 1), "training", disable=None):
        rows = rng.integers(HELD_OUT, len(samples.moments), options.batch)
        rate = options.rate * min(1, number / 20) * min(1, 0.02 + 3 * (1 - number / options.steps))
        losses.append(float(step(*samples(rows, rng, 0.1), one, one, *optimizer.scalars(number, rate))[0]))
        begin = begin or time.perf_counter()
        if number % (options.steps // 5) == 0:
            recent = np.mean(losses[-options.steps // 5 :])
            print(
                f"| {number} | {number * options.batch} | {held_out_loss():.4f} | {recent:.4f} |", flush=True
            )
    print(
        f"{(options.steps - 1) * options.batch / (time.perf_counter() - begin):.1f} pictures a second, "
        f"checks included"
    )
    if options.save:
        save_weights(weights_of(model), options.save)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of scripts/tiny_model/train.py")
    parser.add_argument(
        "--start", type=Path, default=ROOT / "models/tiny_sd_v2.safetensors", help="weights to begin with"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--rate",
        type=float,
        default=5e-4,
        help="learning rate: 20 steps of warm-up, a fall over the last third",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="a new checkpoint for the result")
    options = parser.parse_args()
    with Ending("continue_training.py"):
        if options.save and options.save.exists():
            raise FileExistsError(f"{options.save}: exists already; give another name")
        train(options)


if __name__ == "__main__":
    main()
