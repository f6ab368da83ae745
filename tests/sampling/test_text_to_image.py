"""Guidance, decoding, seeds and class pictures; the shipped model against diffusers."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
import torch
from conftest import ROOT, torch_networks, weights_as_arrays
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.config import read_model_config
from ldm.networks.autoencoder import posterior_sample
from ldm.networks.latent_diffusion import build_model
from ldm.sampling.samplers import sample_ddim, timesteps_of
from ldm.sampling.text_to_image import Guided, Sampling, TextToImage
from ldm.weights.checkpoint import load_checkpoint


def draw(pipeline, count, **changes):
    settings = Sampling(**dict(sampler="ddim", steps=3, guidance_scale=3.0, height=32, width=32) | changes)
    return pipeline(["a dog"] * count, [""] * count, [(5, n) for n in range(count)], settings)


def test_guidance_is_one_doubled_call(pipeline):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    context, negative = rng.standard_normal((2, 2, 77, 48)).astype(np.float32)
    t = ms.Tensor(np.full(2, 300, np.int32))
    positive, empty = (pipeline.unet(ms.Tensor(x), t, ms.Tensor(c)).asnumpy() for c in (context, negative))
    guided = pipeline.denoiser(context, negative, 7.5)(x, 300)
    assert np.abs(guided - (empty + 7.5 * (positive - empty))).max() < 1e-4 * np.abs(guided).max()
    assert np.abs(pipeline.denoiser(context, negative, 1)(x, 300) - positive).max() < 1e-5


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(pipeline, share):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    context, negative = rng.standard_normal((2, 2, 77, 48)).astype(np.float32)
    t = ms.Tensor(np.full(2, 300, np.int32))
    positive, empty = (pipeline.unet(ms.Tensor(x), t, ms.Tensor(c)).asnumpy() for c in (context, negative))
    guided = torch.from_numpy(empty + 7.5 * (positive - empty))
    wanted = rescale_noise_cfg(guided, torch.from_numpy(positive), share).numpy()
    found = Guided(pipeline.unet, share)(
        ms.Tensor(x), ms.Tensor(np.full(4, 300, np.int32)), ms.Tensor(np.concatenate([negative, context])),
        ms.Tensor(7.5, ms.float32),
    ).asnumpy()  # fmt: skip
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_the_same_seed_draws_the_same_picture_in_any_batch(pipeline):
    four, two = draw(pipeline, 4), draw(pipeline, 2)
    assert four.shape == (4, 32, 32, 3) and four.dtype == np.uint8
    assert np.abs(four[:2].astype(int) - two).max() <= 1
    assert np.abs(four[0].astype(int) - four[1]).mean() > 2
    noisy = [draw(pipeline, n, eta=1.0) for n in (2, 2, 4)]
    assert np.array_equal(noisy[0], noisy[1]) and np.abs(noisy[0].astype(int) - noisy[2][:2]).max() <= 1
    assert np.abs(noisy[0].astype(int) - two).mean() > 2


@pytest.mark.parametrize("part, where", [
    ("encode_prompts", "the text encoder"), ("denoiser", "the UNet, denoising step 2 of 3"),
    ("decoder", "the VAE, decoding"),
])  # fmt: skip
def test_values_that_are_not_finite_are_never_a_picture(pipeline, monkeypatch, part, where):
    """NaN and infinite values, in one of two pictures."""
    calls = []

    def broken(values):
        calls.append(1)
        if part != "denoiser" or len(calls) == 2:
            values = values.copy()
            values.flat[0] = np.nan if part == "denoiser" else np.inf
        return values

    whole = getattr(pipeline, part)
    if part == "encode_prompts":
        monkeypatch.setattr(pipeline, part, lambda prompts: broken(whole(prompts)))
    elif part == "decoder":
        monkeypatch.setattr(pipeline, part, lambda z: ms.Tensor(broken(whole(z).asnumpy())))
    else:
        monkeypatch.setattr(pipeline, part, lambda *_: lambda x, t: broken(x * 0.1))
    with pytest.raises(FloatingPointError, match=f"{where}: NaN or infinite values in 1 of 2 images, .*"):
        draw(pipeline, 2)
    half = dataclasses.replace(pipeline.config, precision="float16")
    monkeypatch.setattr(pipeline, "config", half)
    calls.clear()
    with pytest.raises(FloatingPointError, match="try --precision float32, a lower guidance scale"):
        draw(pipeline, 2)


def test_height_and_width(pipeline):
    assert draw(pipeline, 1, height=24, width=40).shape == (1, 24, 40, 3)


def test_posterior_sample():
    mean, log_variance = np.full((1, 2, 2, 2), 3.0), np.full((1, 2, 2, 2), np.log(4.0))
    latents = posterior_sample(np.concatenate([mean, log_variance], 1), np.full((1, 2, 2, 2), 0.5), 0.25)
    assert np.allclose(latents, (3 + 2 * 0.5) * 0.25) and latents.dtype == np.float32


def test_the_shipped_model_draws_the_same_picture_as_diffusers():
    config = read_model_config(ROOT / "configs/train_dreambooth_tiny.yaml")
    path = ROOT / "models/tiny_sd_v2.safetensors"
    assert path.stat().st_size < 20 * 2**20
    model = build_model(config)
    load_checkpoint(model, path)
    pipeline = TextToImage(model, config)
    unet, vae, text_encoder = torch_networks(weights_as_arrays(model), config)
    prompts = ["a penguin in the snow", "a red car on the street"]
    x_T = np.random.default_rng(0).standard_normal((2, 4, 16, 16))

    denoise = pipeline.denoiser(pipeline.encode_prompts(prompts), pipeline.encode_prompts(["", ""]), 4.0)
    timesteps = timesteps_of("ddim", pipeline.schedule, 10)
    *_, latents = sample_ddim(denoise, x_T, pipeline.schedule, timesteps)
    ours = pipeline.decode(latents)

    schedule = dataclasses.asdict(config.noise_schedule)
    scheduler = DDIMScheduler(
        schedule["timesteps"], schedule["beta_start"], schedule["beta_end"], "scaled_linear",
        prediction_type=schedule["prediction_type"], clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    with torch.no_grad():
        context = text_encoder(torch.from_numpy(pipeline.tokenizer(["", "", *prompts])).long())[0]
        x = torch.from_numpy(x_T).float()
        for t in scheduler.timesteps:
            empty, full = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(empty + 4.0 * (full - empty), t, x).prev_sample
        decoded = vae.decode(x / config.autoencoder.scale_factor).sample
    theirs = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    psnr = 10 * np.log10(255**2 / max(1e-9, np.square(ours - theirs.astype(float)).mean()))
    print(f"PSNR {psnr:.1f} dB")
    assert psnr > 40
