"""Trains the tiny Stable Diffusion 2 from scratch, in PyTorch: pictures, then the VAE, then UNet and text
encoder.

    python scripts/tiny_model/train.py pictures --work DIR     # ~2 minutes
    python scripts/tiny_model/train.py vae --work DIR          # --minutes 25
    python scripts/tiny_model/train.py base --work DIR         # --minutes 75; DIR/base is a diffusers folder
    python scripts/convert_checkpoint.py DIR/base models/tiny_sd_v2.safetensors --config
    configs/train_dreambooth_tiny.yaml

Each step saves its state every few minutes and goes on from there when it is started again.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import pictures
import sprites

from ldm.tokenizer import Tokenizer

COUNT, HELD_OUT = 48_000, 512
THREADS = 2
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
prediction_type="v_prediction",
                clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # fmt: skip
PROBES = [
    "a penguin in the snow", "a red car on the street", "a rocket at night", "a frog in the forest",
    "a teddy bear on a wooden floor", "a house on the beach", "a mushroom on the grass",
    "an apple in front of a brick wall",
    "a blue penguin on the beach", "a yellow house in the desert", "a green car in the water",
    "a purple frog in the snow",
    "a penguin", "a photo of a car", "a sks penguin on the grass", "a pink mushroom on a green background",
]  # fmt: skip


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, sample_size=64,
    )  # fmt: skip


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64,
        attention_head_dim=(2, 4, 4), use_linear_projection=True, norm_num_groups=32,
    )  # fmt: skip


def make_text_encoder() -> CLIPTextModel:
    # SD2 pads with id 0; the end mark's id must not be 2, which transformers takes for a legacy
    # configuration.
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=77, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=0,
        projection_dim=64,
    ))  # fmt: skip


def to_pixels(batch: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_sheet(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    array = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(array[i : i + columns]), 1) for i in range(0, len(array), columns)]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.LANCZOS).save(path)


def save_state(path: Path, **state) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


@torch.no_grad()
def average(slow, fast, step: int, limit: float) -> None:
    """Exponential moving average of the weights, with a warm-up."""
    decay = min(limit, 1 - 1 / (step / 4 + 2))
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - decay)


def run_pictures(work: Path, options) -> None:
    drawings, _ = sprites.load(work)
    rng = np.random.default_rng(options.seed)
    images, facts = zip(*(pictures.sample(rng, drawings) for _ in range(COUNT)))
    np.save(work / "pictures.npy", np.stack(images))
    (work / "pictures.json").write_text(json.dumps(facts))


def run_vae(work: Path, options) -> None:
    """L1, squared and gradient error with a small KL term; the learning rate falls along a cosine of the time
    spent.
    """
    data = np.load(work / "pictures.npy", mmap_mode="r")
    held_out = to_pixels(data[:HELD_OUT][:128])
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 4  # the posterior starts narrow
    slow = copy.deepcopy(vae).eval()
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3, betas=(0.9, 0.99))
    step, spent, state_file = 0, 0.0, work / "vae_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        (
            vae.load_state_dict(state["vae"]),
            slow.load_state_dict(state["slow"]),
            optimizer.load_state_dict(state["optimizer"]),
        )
        step, spent = state["step"], state["spent"]
    vae, slow = vae.to(memory_format=torch.channels_last), slow.to(memory_format=torch.channels_last)
    rng, budget, shown, losses = np.random.default_rng(step), 60 * options.minutes, spent, []

    def edges(x):
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    while spent < budget:
        start = time.process_time()
        done = spent / budget
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-5
        rows = np.sort(rng.integers(HELD_OUT, len(data), 16))
        x = to_pixels(data[rows]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        error, kl = x - y, posterior.kl().float().mean() / posterior.mean[0].numel()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y)))
        loss = error.abs().mean() + 3 * error.pow(2).mean() + 0.3 * edge + 2e-4 * kl
        optimizer.zero_grad(), loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0), optimizer.step()
        step += 1
        average(slow, vae, step, 0.998)
        losses.append(loss.item())
        spent += (time.process_time() - start) / THREADS
        if spent - shown > 120 or spent >= budget:
            shown = spent
            with torch.no_grad():
                latents = slow.encode(held_out).latent_dist.mode()
                y = slow.decode(latents).sample.clamp(-1, 1)
            psnr = (-10 * ((y - held_out) / 2).pow(2).mean((1, 2, 3)).log10()).mean().item()
            print(
                f"{spent:.0f}s step {step} loss {np.mean(losses[-200:]):.4f} kl {kl.item():.2f} PSNR "
                f"{psnr:.2f} dB",
                flush=True,
            )
            save_sheet(torch.stack([held_out[:24], y[:24]], 1).flatten(0, 1), work / "vae.png")
            save_state(
                state_file,
                vae=vae.state_dict(),
                slow=slow.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                spent=spent,
            )
    slow.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    slow.save_pretrained(work / "base/vae")


@torch.no_grad()
def encode_pictures(work: Path, vae: AutoencoderKL) -> torch.Tensor:
    """Mean and standard deviation of every picture's posterior, (N, 2, 4, 16, 16) float16."""
    path = work / "moments.npy"
    if not path.exists():
        data, parts = np.load(work / "pictures.npy", mmap_mode="r"), []
        for start in range(0, len(data), 64):
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(to_pixels(data[start : start + 64])).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std], 1).half())
        np.save(path, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(path))


@torch.no_grad()
def draw(
    unet, text_encoder, vae, prompts: list[str], seed: int = 0, steps: int = 25, guidance_scale: float = 4.0
) -> torch.Tensor:
    tokenizer, scheduler = Tokenizer(), DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    ids = torch.from_numpy(tokenizer([""] * len(prompts) + prompts)).long()
    context = text_encoder(ids)[0]
    x = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        empty, full = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(empty + guidance_scale * (full - empty), t, x).prev_sample
    return vae.decode(x / vae.config.scaling_factor).sample


def run_base(work: Path, options) -> None:
    """v-prediction; constant rate, then a linear fall over the last third of the time; one caption in ten is
    left empty.
    """
    vae = AutoencoderKL.from_pretrained(work / "base/vae").eval()
    moments = encode_pictures(work, vae)
    facts = json.loads((work / "pictures.json").read_text())
    tokens = torch.from_numpy(Tokenizer()([""] + [fact["caption"] for fact in facts])).long()
    unet, text_encoder = make_unet(), make_text_encoder()
    slow_unet, slow_text = copy.deepcopy(unet).eval(), copy.deepcopy(text_encoder).eval()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    print(
        f"UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f}M, text "
        f"{sum(p.numel() for p in text_encoder.parameters()) / 1e6:.2f}M",
        flush=True,
    )
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    named = {
        "unet": unet,
        "text": text_encoder,
        "slow_unet": slow_unet,
        "slow_text": slow_text,
        "optimizer": optimizer,
    }
    step, spent, state_file = 0, 0.0, work / "base_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for key, module in named.items():
            module.load_state_dict(state[key])
        step, spent = state["step"], state["spent"]
    rng, generator = np.random.default_rng(step), torch.Generator().manual_seed(step)
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    budget, shown, sheet, losses = 60 * options.minutes, spent, spent, []
    while True:
        start = time.process_time()
        done = min(1.0, spent / budget)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 300) * min(1, 0.01 + 3 * (1 - done))
        rows = rng.integers(HELD_OUT, len(moments), options.batch)
        mean, std = moments[rows].float().unbind(1)
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor
        t = torch.randint(0, 1000, (len(rows),), generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        ids = tokens[np.where(rng.random(len(rows)) < 0.1, 0, rows + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(a * latents + s * noise, t, text_encoder(ids)[0]).sample.float()
        loss = (prediction - (a * noise - s * latents)).pow(2).mean()
        optimizer.zero_grad(), loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0), optimizer.step()
        step += 1
        average(slow_unet, unet, step, 0.9995), average(slow_text, text_encoder, step, 0.9995)
        losses.append(loss.item())
        spent += (time.process_time() - start) / THREADS
        if spent - shown > 120 or spent >= budget:
            shown = spent
            print(
                f"{spent:.0f}s step {step} pictures {step * options.batch} loss {np.mean(losses[-400:]):.4f}",
                flush=True,
            )
            save_state(
                state_file,
                **{key: module.state_dict() for key, module in named.items()},
                step=step,
                spent=spent,
            )
            if spent - sheet > 600 or spent >= budget:
                sheet = spent
                save_sheet(draw(slow_unet, slow_text, vae, PROBES), work / f"base_{int(spent):05d}.png")
        if spent >= budget:
            break
    slow_unet.save_pretrained(work / "base/unet"), slow_text.save_pretrained(work / "base/text_encoder")
    DDIMScheduler(**SCHEDULE).save_pretrained(work / "base/scheduler")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("pictures", "vae", "base"))
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, states and results")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="time to train for, over all starts, as processor time over threads",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed), torch.set_num_threads(THREADS)
    {"pictures": run_pictures, "vae": run_vae, "base": run_base}[options.step](options.work, options)


if __name__ == "__main__":
    main()
