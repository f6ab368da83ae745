"""The shipped model in other programs' formats, opened and used by diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from convert_checkpoint import main
from diffusers import DDIMScheduler, StableDiffusionPipeline
from mindspore.common.initializer import initializer

from ldm.networks.latent_diffusion import build_model
from ldm.sampling.samplers import sample_ddim, timesteps_of
from ldm.sampling.text_to_image import TextToImage
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.choice import choose_config
from ldm.weights.lora_merge import read_loras
from ldm.weights.source import open_weights

TINY = ROOT / "models/tiny_sd_v2.safetensors"
PROMPTS = ["a penguin in the snow", "a red car on the street"]
STEPS, GUIDANCE = 10, 4.0


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """As a folder of diffusers, and as one file under Stability's names."""
    place = tmp_path_factory.mktemp("converted")
    for name in ("folder", "single.safetensors"):
        main([str(TINY), str(place / name)])
    return place


@pytest.fixture(scope="module")
def start():
    """Latents to begin with."""
    return np.random.default_rng(0).standard_normal((2, 4, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def tiny():
    """The pipeline of the shipped model, compiled once; the model; and its configuration."""
    config = choose_config(open_weights(TINY)).config
    model = build_model(config)
    return TextToImage(model, config), model, config


@pytest.fixture(scope="module")
def draw(tiny, start):
    """Pictures by this program with the weights of a file or folder, and LoRA files, FILE or FILE:WEIGHT:
    (2, 64, 64, 3) uint8.
    """
    pipeline, model, config = tiny

    def drawn(path, *loras) -> np.ndarray:
        source = choose_config(open_weights(path))
        assert source.config == config
        for parameter in model.get_parameters():
            parameter.set_data(initializer("zeros", parameter.shape, parameter.dtype))
        added = read_loras(list(map(str, loras)), model.parameter_shapes(), config)
        load_checkpoint(model, source, added=added)
        context, empty = pipeline.encode_prompts(PROMPTS), pipeline.encode_prompts(["", ""])
        steps = timesteps_of("ddim", pipeline.schedule, STEPS)
        *_, latents = sample_ddim(
            pipeline.denoiser(context, empty, GUIDANCE), start, pipeline.schedule, steps
        )
        return pipeline.decode(latents)

    return drawn


@pytest.fixture(scope="module")
def ours(draw):
    return draw(TINY)


def drawn_by(pipeline: StableDiffusionPipeline, start) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
                    latents=torch.from_numpy(start), height=64, width=64)  # fmt: skip
    return (made.images * 255).round()


def psnr(a, b) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean()))


def test_a_folder_is_opened_offline_and_draws_the_same(converted, start, ours):
    pipeline = StableDiffusionPipeline.from_pretrained(converted / "folder", local_files_only=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler) and not pipeline.scheduler.config.clip_sample
    assert pipeline.tokenizer.model_max_length == 77 and len(pipeline.tokenizer) == 49408
    value = psnr(drawn_by(pipeline, start), ours)  # by its own scheduler, as it is
    print(f"PSNR {value:.1f} dB")
    assert value > 40


def test_a_single_file_is_opened_and_draws_the_same(converted, start, ours):
    pipeline = StableDiffusionPipeline.from_single_file(
        str(converted / "single.safetensors"), config=str(converted / "folder"), local_files_only=True
    )
    value = psnr(drawn_by(pipeline, start), ours)
    print(f"PSNR {value:.1f} dB")
    assert value > 40


HOWS = {
    "plain": {}, "variant": {"variant": "fp16"}, "shards": {"max_shard_size": "2MB"},
    "bfloat16": {"dtype": torch.bfloat16},
}  # fmt: skip


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_what_diffusers_saves_draws_the_same(tmp_path, converted, draw, ours, how):
    """The whole pipeline with its own configurations and tokenizer; rounded to bfloat16 nearly the same."""
    pipeline = StableDiffusionPipeline.from_pretrained(converted / "folder", local_files_only=True)
    how = dict(how)
    dtype = how.pop("dtype", None)
    if dtype:
        pipeline.to(dtype)
    pipeline.save_pretrained(tmp_path / "saved", **how)
    value = psnr(draw(tmp_path / "saved"), ours)
    print(f"PSNR {value:.1f} dB")
    assert value > (30 if dtype else 60)


def test_the_tokenizer_of_a_folder_is_ours(converted, tiny):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(converted / "folder/tokenizer", local_files_only=True)
    tokenizer = tiny[0].tokenizer
    prompts = [*PROMPTS, "", "Ein großer Hund, 3 Pferde & a photo of sks dog's house", "x" * 500]
    given = theirs(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    assert np.array_equal(given, tokenizer(prompts))
