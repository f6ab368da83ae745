"""Guidance, decoding, seeds and class pictures; the shipped model against diffusers."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
import torch
from conftest import ROOT, torch_networks, weights_as_arrays
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from ldm.config import read_model_config
from ldm.networks.autoencoder import posterior_sample
from ldm.networks.latent_diffusion import build_model
from ldm.prompts import PromptSyntax
from ldm.sampling.samplers import sample_ddim, timesteps_of
from ldm.sampling.text_to_image import Guided, Sampling, TextToImage
from ldm.weights.checkpoint import load_checkpoint


def tiny_model():
    config = read_model_config(ROOT / "configs/train_dreambooth_tiny.yaml")
    model = build_model(config)
    load_checkpoint(model, ROOT / "models/tiny_sd_v2.safetensors")
    return model, config


def ddim_of_diffusers(config) -> DDIMScheduler:
    schedule = dataclasses.asdict(config.noise_schedule)
    return DDIMScheduler(
        schedule["timesteps"], schedule["beta_start"], schedule["beta_end"], "scaled_linear",
        prediction_type=schedule["prediction_type"], clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def psnr_of(ours, theirs) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.square(ours - theirs.astype(float)).mean()))


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
        monkeypatch.setattr(pipeline, part, lambda *its: broken(whole(*its)))
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
    assert (ROOT / "models/tiny_sd_v2.safetensors").stat().st_size < 20 * 2**20
    model, config = tiny_model()
    pipeline = TextToImage(model, config)
    unet, vae, text_encoder = torch_networks(weights_as_arrays(model), config)
    prompts = ["a penguin in the snow", "a red car on the street"]
    x_T = np.random.default_rng(0).standard_normal((2, 4, 16, 16))

    denoise = pipeline.denoiser(pipeline.encode_prompts(prompts), pipeline.encode_prompts(["", ""]), 4.0)
    timesteps = timesteps_of("ddim", pipeline.schedule, 10)
    *_, latents = sample_ddim(denoise, x_T, pipeline.schedule, timesteps)
    ours = pipeline.decode(latents)

    scheduler = ddim_of_diffusers(config)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        context = text_encoder(torch.from_numpy(pipeline.tokenizer(["", "", *prompts])).long())[0]
        x = torch.from_numpy(x_T).float()
        for t in scheduler.timesteps:
            empty, full = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(empty + 4.0 * (full - empty), t, x).prev_sample
        decoded = vae.decode(x / config.autoencoder.scale_factor).sample
    theirs = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    psnr = psnr_of(ours, theirs)
    print(f"PSNR {psnr:.1f} dB")
    assert psnr > 40


def test_an_image_to_begin_with_leads_where_diffusers_gets(monkeypatch):
    """SDEdit with several strengths, from the same noise; the image as the mean of the posterior."""
    model, config = tiny_model()
    pipeline = TextToImage(model, config)
    unet, vae, text_encoder = torch_networks(weights_as_arrays(model), config)
    theirs = StableDiffusionImg2ImgPipeline(
        vae, text_encoder, None, unet, ddim_of_diffusers(config), None, None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a penguin in the snow", "a red car on the street"]
    image = np.asarray(Image.open(sorted((ROOT / "examples/penguin").glob("*.png"))[0]).convert("RGB"))
    found = []
    for strength in (0.3, 0.58, 1.0):  # 0.58 of 50 is 29, less a rounding
        noise = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(3))
        monkeypatch.setattr(pipeline, "initial_noise", lambda *_, noise=noise: noise.double().numpy())
        settings = Sampling("ddim", 50, 4.0, 64, 64, strength=strength)
        found.append(pipeline(prompts, ["", ""], [(0, 0), (0, 1)], settings, image=image))
        with torch.no_grad():
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents = vae.encode(pixels).latent_dist.mean * config.autoencoder.scale_factor
            context, empty = (
                text_encoder(torch.from_numpy(pipeline.tokenizer(its)).long())[0]
                for its in (prompts, ["", ""])
            )
            wanted = theirs(
                image=latents.repeat(2, 1, 1, 1), strength=strength, num_inference_steps=50,
                guidance_scale=4.0, prompt_embeds=context, negative_prompt_embeds=empty, output_type="np",
                generator=torch.Generator().manual_seed(3),
            ).images  # fmt: skip
        psnr = psnr_of(found[-1], wanted * 255)
        print(f"strength {strength}: PSNR {psnr:.1f} dB")
        assert psnr > 40
    apart = [np.abs(its.astype(float) - image).mean() for its in found]
    assert apart == sorted(apart) and apart[0] < apart[2] / 2


def test_long_prompts_and_weights_are_encoded_part_by_part(pipeline):
    """Each part as the text encoder reads it alone, side by side; weights as AUTOMATIC1111 applies them."""
    weighing = TextToImage.__new__(TextToImage)
    weighing.__dict__ |= pipeline.__dict__ | {"syntax": PromptSyntax(True, True)}
    *parts, empty = (pipeline.encode_prompts([its])[0] for its in ("dog " * 75, "a cat", "red", ""))
    found = weighing.encode_prompts(["dog " * 75 + "a cat BREAK (red:1.5)", "red"])
    assert found.shape == (2, 3 * 77, 48)
    product = torch.from_numpy(parts[2].copy())
    before = product.mean()
    product[1] *= 1.5
    parts[2] = (product * (before / product.mean())).numpy()
    error = np.abs(found[0] - np.concatenate(parts)).max()
    print(f"max |a-b| {error:.1e}")
    assert error < 1e-5
    assert np.abs(found[1] - np.concatenate([pipeline.encode_prompts(["red"])[0], empty, empty])).max() < 1e-5
    settings = Sampling("ddim", 2, 3.0, 32, 32)
    drawn = weighing(["dog " * 80, "cat"], ["", "blurry " * 80], [(5, 0), (5, 1)], settings)
    assert drawn.shape == (2, 32, 32, 3)
