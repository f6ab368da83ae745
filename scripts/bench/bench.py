"""This project against PyTorch with diffusers: the same sizes, the same work, in turns, each job in a process
of its own.

    python scripts/bench/bench.py --preset tiny
    python scripts/bench/bench.py --preset full --figures step,denoise,decode --json bench.json
    python scripts/bench/bench.py --ranks 2             # how training scales: see
    scripts/bench/bench_ranks.py

Each side fills its networks with random weights of its own; values do not matter here (tests/ compare those).
A figure is the median of its timed repetitions over all rounds; the first of every process is left out, since
it compiles. The peer runs as its users run it: fused attention, default threads, in the memory layout
(channels first or last) that is measured to be the faster, without a cap on oneDNN's instruction set. With
--precision bfloat16 it trains under autocast and draws with weights of bfloat16. Nothing else should run
meanwhile.

figures:
  step         a training step, UNet only, clipping and AdamW; the peer encodes its pictures in every step, as
  diffusers'
               train_dreambooth.py does, ours takes cached latents
  step_cached  the same with cached latents on both sides
  text_step    a training step, UNet and text encoder; the peer encodes in every step and has gradient
  checkpointing on;
               neither clips, as is this project's default
  lora         a training step of rank 16 additions to the attention of UNet and text encoder, on the peer's
               side with PEFT; latents cached on both sides, no clipping; and the same with this project's own
               full fine-tuning in the peer's column
  denoise      a denoising step of one picture with guidance (the UNet on a batch of 2)
  decode       one picture from its latents
  start        seconds from loaded weights to the end of the first training step, less a steady step: with an
  empty
               folder of compiled graphs (round 1), and with the one that round 1 left behind
  sample       pictures with guidance, PLMS / PNDM
  memory       resident memory late in a training against early in it
Every figure in seconds but `start` also gives the peak resident memory of its processes.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median

ENVIRONMENT = dict(os.environ)  # before ldm sets variables for MindSpore, which are not to reach the peer
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import bench_ranks

from ldm.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    read_model_config,
)
from ldm.tokenizer import Tokenizer
from ldm.weights.diffusers_folder import diffusers_configs

LORA = dict(train_text_encoder=True, lora_rank=16)
PROMPTS = ("a photo of sks dog", "a photo of a dog", "")  # of the instance, of the class, negative


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of the networks and of the work.

    Attributes:
        batch: instance pictures a training step, with as many class pictures on top.
        steps: timed repetitions of a process.
        memory_steps: the two steps after which resident memory is read.
        pictures, sampling_steps: of the figure `sample`.
    """

    config: ModelConfig
    batch: int
    steps: int
    figures: tuple[str, ...]
    memory_steps: tuple[int, int] = (20, 300)
    pictures: int = 8
    sampling_steps: int = 50


def presets() -> dict[str, Preset]:
    full = read_model_config(ROOT / "configs/train_dreambooth_sd_v2.yaml")
    medium = dataclasses.replace(
        full,
        image_size=256,
        unet=dataclasses.replace(
            full.unet, model_channels=128, num_res_blocks=1, context_dim=512
        ),  # 94.1M parameters
        autoencoder=dataclasses.replace(full.autoencoder, base_channels=64),  # 20.9M
        text_encoder=dataclasses.replace(full.text_encoder, width=512, heads=8, layers=6),  # 44.3M
    )
    smoke = ModelConfig(
        image_size=32, unet=UNetConfig(4, 4, 32, (1, 2), 1, (), 16, 48, norm_groups=8),
        autoencoder=AutoencoderConfig(3, 4, 16, (1, 2), 1, 0.5, norm_groups=4),
        text_encoder=TextEncoderConfig(49408, 77, 48, 3, 1),
        noise_schedule=ScheduleConfig(1000, 0.00085, 0.012, "epsilon"),
    )  # fmt: skip
    light = ("step", "step_cached", "text_step", "lora", "denoise", "decode", "start")
    every = (*light, "sample", "memory")
    return {
        "smoke": Preset(smoke, 1, 1, every, memory_steps=(2, 4), pictures=1, sampling_steps=2),
        "tiny": Preset(read_model_config(ROOT / "configs/train_dreambooth_tiny.yaml"), 4, 50, every),
        "medium": Preset(medium, 1, 4, (*light, "memory")),
        "full": Preset(full, 1, 2, light),
    }


def run_job(side: str, preset: Preset, cache: Path, **fields) -> dict:
    """Run a job in a process of its own; what it measured, or {"error": why it died}.

    Args:
        side: `ours` or `peer`: scripts/bench_<side>.py.
        cache: folder of MindSpore's compiled graphs.
        fields: `task` is train, memory, profile, denoise, decode or sample, and on the peer's side layout,
            which finds the faster memory layout. `encode`: the peer's VAE works in every step.
            `channels_last`: the peer's memory layout; None: the process finds the faster one itself. The rest
            as in Preset.
    """
    config = preset.config
    job = {
        "train_text_encoder": False, "lora_rank": 0, "encode": False, "channels_last": None,
        "steps": preset.steps, "batch": preset.batch,
        "pictures": 1, "sampling_steps": preset.sampling_steps, "memory_steps": preset.memory_steps,
        "prompts": PROMPTS, "precision": config.precision,
        "token_ids": Tokenizer(config.text_encoder.context_length)(PROMPTS).tolist(),
        "diffusers": diffusers_configs(config),
    } | fields  # fmt: skip
    environment = {
        name: value for name, value in ENVIRONMENT.items() if side == "ours" or name != "ONEDNN_MAX_CPU_ISA"
    }
    environment |= {"MS_COMPILER_CACHE_PATH": str(cache), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        job["model_config"] = str(Path(folder) / "model.json")
        Path(job["model_config"]).write_text(json.dumps(dataclasses.asdict(config)))
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        worker = [sys.executable, str(Path(__file__).with_name(f"bench_{side}.py")), str(file)]
        done = subprocess.run(worker, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode < 0:
        return {
            "error": f"killed by signal {-done.returncode}" + " (out of memory?)" * (done.returncode == -9)
        }
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


class Runs:
    """The jobs of a run of this script, each done once in a round: figures share them."""

    def __init__(self, preset: Preset, rounds: int, cache: Path) -> None:
        self.preset, self.rounds, self.cache = preset, rounds, cache
        self.results = {}

    def job(self, side: str, turn: int, **fields) -> dict:
        results = self.results.setdefault((side, *sorted(fields.items())), [])
        if len(results) == turn:
            died = turn > 0 and "error" in results[-1]
            results.append(results[-1] if died else run_job(side, self.preset, self.cache, **fields))
        return results[turn]

    def pair(self, ours: dict, peer: dict, rounds: int) -> dict[str, list[dict]]:
        """The results of both sides' jobs, which run in turns."""
        results = {"ours": [], "peer": []}
        for turn in range(rounds):
            results["ours"].append(self.job("ours", turn, **ours))
            results["peer"].append(self.job("peer", turn, **peer))
        return results

    @cached_property
    def channels_last(self) -> bool | None:
        """Whether the peer trains faster with channels last.

        Found by a job of its own, so as not to raise the peak memory.
        """
        result = run_job("peer", self.preset, self.cache, task="layout")
        print(f"the peer's memory layout in training: {result}", file=sys.stderr)
        return result.get("channels_last")

    def training(self, kind: str, least_rounds: int = 1) -> dict[str, list[dict]]:
        trains_text = kind == "text_step"
        ours = dict(task="train", train_text_encoder=trains_text)
        return self.pair(
            ours,
            ours | dict(encode=kind != "step_cached", channels_last=self.channels_last),
            max(self.rounds, least_rounds),
        )

    def lora(self) -> dict[str, list[dict]]:
        """Of LoRA on both sides, and under `full` of this project's own full fine-tuning."""
        results = {"ours": [], "peer": [], "full": []}
        for turn in range(self.rounds):
            results["full"].append(self.job("ours", turn, task="train", train_text_encoder=True))
            results["ours"].append(self.job("ours", turn, task="train", **LORA))
            results["peer"].append(
                self.job("peer", turn, task="train", **LORA, channels_last=self.channels_last)
            )
        return results

    def drawing(self, task: str) -> dict[str, list[dict]]:
        fields = (
            dict(task=task, steps=1, pictures=self.preset.pictures) if task == "sample" else dict(task=task)
        )
        return self.pair(fields, fields, self.rounds)

    def memory(self) -> dict[str, list[dict]]:
        return self.pair(dict(task="memory"), dict(task="memory", channels_last=self.channels_last), rounds=1)


def row(name: str, unit: str, results: dict[str, list[dict]], value) -> dict:
    """A figure: `value` of either side's results; None and the reason for a side that died."""
    figure = {"name": name, "ours": None, "peer": None, "ratio": None, "unit": unit}
    for side, runs in results.items():
        error = next((run["error"] for run in runs if "error" in run), None)
        if error:
            figure["error"] = f"{side}: {error}" + (f"; {figure['error']}" if "error" in figure else "")
        else:
            figure[side] = value(runs)
    if figure["ours"] is not None and figure["peer"]:
        figure["ratio"] = figure["ours"] / figure["peer"]
    return figure


def seconds(runs: list[dict]) -> float:
    return median(second for run in runs for second in run["seconds"])


def peak(runs: list[dict]) -> float:
    return max(run["peak_gib"] for run in runs)


def start_up(run: dict) -> float:
    return run["first"] - median(run["seconds"])


def figures(kind: str, runs: Runs):
    """The rows of one of the figures that the command line names."""
    names = {
        "step": "train_step_encode", "step_cached": "train_step_cached",
        "text_step": "train_step_text_encoder",
        "denoise": "denoise_step", "decode": "vae_decode",
        "sample": f"sample_{runs.preset.sampling_steps}_steps",
    }  # fmt: skip
    if kind == "start":
        ours, peer = runs.training("step", least_rounds=2).values()
        for turn, name in enumerate(("first_step_cold", "first_step_cached")):
            yield row(
                name, "s", {"ours": [ours[turn]], "peer": peer}, lambda those: median(map(start_up, those))
            )
    elif kind == "lora":
        results = runs.lora()
        full = {"ours": results["ours"], "peer": results.pop("full")}
        for name, pair in (("lora_step", results), ("lora_step_of_full", full)):
            yield row(name, "s", pair, seconds)
            yield row(f"peak_memory_{name}", "GiB", pair, peak)
    elif kind == "memory":
        results = runs.memory()
        for turn, step in enumerate(runs.preset.memory_steps):
            yield row(
                f"memory_at_step_{step}",
                "GiB",
                results,
                lambda those, turn=turn: those[0]["resident_gib"][turn],
            )
        flat = row(
            "memory_flat",
            "late / early",
            results,
            lambda those: those[0]["resident_gib"][1] / those[0]["resident_gib"][0],
        )
        yield flat | {"ratio": flat["ours"]}
    else:
        results = runs.training(kind) if kind in ("step", "step_cached", "text_step") else runs.drawing(kind)
        yield row(names[kind], "s", results, seconds)
        yield row(f"peak_memory_{names[kind]}", "GiB", results, peak)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def line(figure: dict) -> str:
    ours, peer, ratio = (
        f"{figure[key]:>10.3f}" if figure[key] is not None else f"{'-':>10}"
        for key in ("ours", "peer", "ratio")
    )
    return f"{figure['name']:<36} {ours} {peer} {ratio}  {figure['unit']}" + (
        f"  {figure['error']}" if "error" in figure else ""
    )


def main() -> None:
    known = presets()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=known, default="tiny", help="sizes; smoke is for the tests [%(default)s]"
    )
    parser.add_argument("--figures", help=f"some of {','.join(known['smoke'].figures)} [the preset's]")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of both sides [%(default)s]"
    )
    parser.add_argument(
        "--steps", type=int, help="timed repetitions of a process, after the first [the preset's]"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="processes of either side for a figure, in turns [%(default)s]"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        help="instead: this many processes with a core each against one (the peer) with one core",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, after each of them")
    options = parser.parse_args()
    preset = known[options.preset]
    preset = dataclasses.replace(
        preset, config=dataclasses.replace(preset.config, precision=options.precision)
    )
    chosen = options.figures.split(",") if options.figures else preset.figures
    if options.ranks is not None and options.ranks < 2:
        parser.error("ranks: 2 or more wanted")
    unknown = set(chosen) - set(known["smoke"].figures)
    if unknown or min(options.rounds, options.steps or 1) < 1:
        parser.error(
            f"unknown figures {sorted(unknown)}" if unknown else "steps and rounds: 1 or more wanted"
        )
    if options.steps:
        preset = dataclasses.replace(preset, steps=options.steps)
    report = {
        "figures": [],
        "preset": options.preset,
        "precision": options.precision,
        "steps": preset.steps,
        "rounds": options.rounds,
        "processor": processor(),
    }
    report["versions"] = {
        name: version(name) for name in ("mindspore", "torch", "diffusers", "transformers", "peft", "numpy")
    }
    with tempfile.TemporaryDirectory() as cache:
        runs = Runs(preset, options.rounds, Path(cache))
        for kind in chosen if not options.ranks else ["ranks"]:
            for figure in bench_ranks.figures(options.ranks) if options.ranks else figures(kind, runs):
                report["figures"].append(figure)
                print(line(figure), file=sys.stderr)
            if options.json:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"\n{options.preset} in {options.precision} on {report['processor']}; "
        f"{', '.join(' '.join(pair) for pair in report['versions'].items())}"
    )
    print(
        f"{'figure':<36} {'ours':>10} {'peer':>10} {'ratio':>10}  unit",
        *map(line, report["figures"]),
        sep="\n",
    )


if __name__ == "__main__":
    main()
