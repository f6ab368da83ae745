"""Presets, and jobs that run in a process of their own: `bench_ours.py`."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = dict(os.environ)  # before ldm sets variables for MindSpore, which are not to reach the peer
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, read_model_config
from ldm.convert import diffusers_configs
from ldm.tokenizer import Tokenizer

PROMPTS = ("a photo of sks dog", "a photo of a dog", "")  # of the instance, of the class, negative


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of the networks and of the work. `batch`: instance pictures a step, with as many class pictures on top."""

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
        unet=dataclasses.replace(full.unet, model_channels=128, num_res_blocks=1, context_dim=512),  # 94.1M parameters
        autoencoder=dataclasses.replace(full.autoencoder, base_channels=64),  # 20.9M
        text_encoder=dataclasses.replace(full.text_encoder, width=512, heads=8, layers=6),  # 44.3M
    )
    smoke = ModelConfig(
        image_size=32, use_fp16=False, unet=UNetConfig(4, 4, 32, (1, 2), 1, (1,), 16, 48, norm_groups=8),
        autoencoder=AutoencoderConfig(3, 4, 16, (1, 2), 1, 0.5, norm_groups=4), text_encoder=TextEncoderConfig(49408, 77, 48, 3, 1),
        noise_schedule=ScheduleConfig(1000, 0.00085, 0.012, "epsilon"),
    )  # fmt: skip
    light = ("step", "step_cached", "text_step", "denoise", "decode", "start")
    every = (*light, "sample", "memory")
    return {
        "smoke": Preset(smoke, 1, 1, every, memory_steps=(2, 4), pictures=1, sampling_steps=2),
        "tiny": Preset(read_model_config(ROOT / "configs/train_dreambooth_tiny.yaml"), 4, 20, every),
        "medium": Preset(medium, 1, 5, (*light, "memory")),
        "full": Preset(full, 1, 3, light),
    }


def run_job(side: str, preset: Preset, cache: Path, **fields) -> dict:
    """Run a job in a process of its own; what it measured, or {"error": why it died}.

    Args:
        side: `ours` or `peer`: scripts/bench_<side>.py.
        cache: folder of MindSpore's compiled graphs.
        fields: `task` is train, memory, profile, denoise, decode or sample; the rest is set on the defaults below.
    """
    config = preset.config
    job = {
        "train_text_encoder": False, "encode": False, "channels_last": None, "steps": preset.steps, "batch": preset.batch,
        "pictures": 1, "sampling_steps": preset.sampling_steps, "memory_steps": preset.memory_steps, "prompts": PROMPTS,
        "token_ids": Tokenizer(config.text_encoder.context_length)(PROMPTS).tolist(), "diffusers": diffusers_configs(config),
    } | fields  # fmt: skip
    environment = {name: value for name, value in ENVIRONMENT.items() if side == "ours" or name != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"MS_COMPILER_CACHE_PATH": str(cache), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        job["model_config"] = str(Path(folder) / "model.json")
        Path(job["model_config"]).write_text(json.dumps(dataclasses.asdict(config)))
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        worker = [sys.executable, str(Path(__file__).with_name(f"bench_{side}.py")), str(file)]
        done = subprocess.run(worker, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}" + " (out of memory?)" * (done.returncode == -9)}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])
