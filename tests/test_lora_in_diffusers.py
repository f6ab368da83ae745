"""LoRA files between this program and diffusers' own pipeline with PEFT: the same pictures."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from loras import random_pairs, written
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_other_programs import TINY, converted, draw, drawn_by, psnr, start, tiny

from ldm.fields import LORA_TARGETS
from ldm.weights.lora_units import units_of

__all__ = ["converted", "draw", "start", "tiny"]  # fixtures


@pytest.fixture
def theirs(converted):
    return StableDiffusionPipeline.from_pretrained(converted / "folder", local_files_only=True)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_diffusers_draws_with_our_file_what_we_draw(tmp_path, tiny, draw, theirs, start, naming):
    """UNet and text encoder, all kinds of layers, alpha other than the rank, weight 0.7."""
    _, model, config = tiny
    units = units_of(model.parameter_shapes(), config)
    pairs = random_pairs(units, rank=4, alpha=2.0, targets=LORA_TARGETS, strength=0.4)
    path = written(tmp_path / "ours.safetensors", units, pairs, naming, np.float16)
    theirs.load_lora_weights(path)
    assert len(theirs.get_list_adapters()) == 2  # unet and text encoder
    theirs.set_adapters(theirs.get_active_adapters(), [0.7])
    ours, plain = draw(TINY, f"{path}:0.7"), draw(TINY)
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
    ours, plain = draw(TINY, tmp_path), draw(TINY)
    value, moved = psnr(drawn_by(theirs, start), ours), psnr(plain, ours)
    print(f"PSNR {value:.1f} dB; to the base model {moved:.1f} dB")
    assert value > 40 and moved < 25
