"""LoRA files between this program and diffusers' own pipeline with PEFT: the same pictures."""

import numpy as np
import pytest
import torch
from conftest import weights_as_arrays
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from loras import random_pairs, written
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_other_programs import GUIDANCE, PROMPTS, STEPS, TINY, converted, drawn_by, psnr, start

from ldm.fields import LORA_TARGETS
from ldm.networks.latent_diffusion import build_model
from ldm.sampling.samplers import sample_ddim, timesteps_of
from ldm.sampling.text_to_image import TextToImage
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.choice import choose_config
from ldm.weights.lora_merge import read_loras
from ldm.weights.lora_units import units_of
from ldm.weights.source import open_weights

__all__ = ["converted", "start"]  # fixtures


@pytest.fixture(scope="module")
def tiny():
    """The pipeline of the shipped model, compiled once; and its units."""
    source = choose_config(open_weights(TINY))
    model = build_model(source.config)
    load_checkpoint(model, source)
    return TextToImage(model, source.config), model, source


@pytest.fixture(scope="module")
def draw(tiny, start):
    """Pictures by this program with LoRA files, FILE or FILE:WEIGHT."""
    pipeline, model, source = tiny

    def drawn(*files) -> np.ndarray:
        shapes = {parameter.name: parameter.shape for parameter in model.get_parameters()}
        load_checkpoint(model, source, added=read_loras(list(map(str, files)), shapes, source.config))
        context, empty = pipeline.encode_prompts(PROMPTS), pipeline.encode_prompts(["", ""])
        *_, latents = sample_ddim(
            pipeline.denoiser(context, empty, GUIDANCE),
            start,
            pipeline.schedule,
            timesteps_of("ddim", pipeline.schedule, STEPS),
        )
        return pipeline.decode(latents)

    return drawn


@pytest.fixture
def theirs(converted):
    return StableDiffusionPipeline.from_pretrained(converted / "folder", local_files_only=True)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_diffusers_draws_with_our_file_what_we_draw(tmp_path, tiny, draw, theirs, start, naming):
    """UNet and text encoder, all kinds of layers, alpha other than the rank, weight 0.7."""
    _, model, source = tiny
    units = units_of({name: values.shape for name, values in weights_as_arrays(model).items()}, source.config)
    pairs = random_pairs(units, rank=4, alpha=2.0, targets=LORA_TARGETS, strength=0.4)
    path = written(tmp_path / "ours.safetensors", units, pairs, naming, np.float16)
    theirs.load_lora_weights(path)
    assert len(theirs.get_list_adapters()) == 2  # unet and text encoder
    theirs.set_adapters(theirs.get_active_adapters(), [0.7])
    ours, plain = draw(f"{path}:0.7"), draw()
    value, moved = psnr(drawn_by(theirs, start), ours), psnr(plain, ours)
    print(f"PSNR {value:.1f} dB; to the base model {moved:.1f} dB")
    assert value > 40 and moved < 25


def test_we_draw_with_a_file_of_diffusers_what_it_draws(tmp_path, draw, theirs, start):
    """Trained by PEFT's adapters and saved by the pipeline, with and without its metadata on alpha."""
    torch.manual_seed(0)
    parts = {}
    for name, targets in (
        ("unet", ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.2"]),
        ("text_encoder", ["q_proj", "v_proj"]),
    ):
        network = getattr(theirs, name)
        network.add_adapter(LoraConfig(r=5, lora_alpha=5, target_modules=targets))
        for parameter_name, parameter in network.named_parameters():
            if ".lora_B." in parameter_name:
                torch.nn.init.normal_(parameter, std=0.15)
        parts[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    theirs.save_lora_weights(tmp_path, **parts)
    ours, plain = draw(tmp_path), draw()
    value, moved = psnr(drawn_by(theirs, start), ours), psnr(plain, ours)
    print(f"PSNR {value:.1f} dB; to the base model {moved:.1f} dB")
    assert value > 40 and moved < 25
