"""What is no model of Stable Diffusion 1 or 2 is refused by what it is, in one line that says what to do."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import SHALLOW, random_model, weights_as_arrays
from safetensors.torch import save_file

from ldm.config import ModelConfig
from ldm.values import ConfigError
from ldm.weights.choice import choose_config
from ldm.weights.diffusers_folder import config_of_folder, folder_files
from ldm.weights.source import open_weights

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
PROJECTION = f"{UNET}input_blocks.0.0.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5214604494\n"
FILES = {
    "Git-LFS pointer": (LFS, "is a Git-LFS pointer .* of 5.21 GB: run `git lfs pull`"),
    "web page": (b"\n<!DOCTYPE html><html><head>", "is a web page, not a weight file"),
    "error of a site": (b'{"error": "gated repository"}', "is a web page, not a weight file"),
    "empty": (b"", "is empty: the download was cut off"),
    "safetensors cut in its header": (
        (1000).to_bytes(8, "little") + b'{"a.weight":{"dtype":"F32","shape":[2,',
        "is the beginning of a safetensors file: the download was cut off",
    ),
    "safetensors cut in its values": (
        (55).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}' + bytes(9),
        "is not as long as its header says.*; get it again",
    ),
    "GGUF": (b"GGUF\x03\0\0\0", "is a GGUF file, .*: get the model as safetensors"),
    "bare pickle": (b"\x80\x04\x95\x10\0\0\0", "is a bare Python pickle, .*: not run"),
    "text": (b"hello", "not a readable weight file"),
}
ENTRIES = {
    "nothing": ({}, "it has no weights in it: get it again"),
    "XL": ({"conditioner.embedders.1.model.ln_final.weight": (1280,), f"{UNET}label_emb.0.0.weight": (4, 4)},
           "this is Stable Diffusion XL"),
    "XL refiner": ({"conditioner.embedders.0.model.ln_final.weight": (1280,),
                    f"{UNET}label_emb.0.0.weight": (4,)},
                   "this is Stable Diffusion XL"),
    "inpainting": ({PROJECTION: (320, 9, 3, 3), f"{TEXT}model.ln_final.weight": (4,)},
         "this is an inpainting model"),
    "pix2pix": ({PROJECTION: (320, 8, 3, 3), f"{UNET}input_blocks.1.0.in_layers.0.weight": (4,)},
                "this is an instruct-pix2pix model"),
    "depth": ({PROJECTION: (320, 5, 3, 3), f"{TEXT}model.ln_final.weight": (4,)},
         "this is a depth-to-image model"),
    "unCLIP": ({f"{UNET}label_emb.0.0.weight": (4, 4)}, "this is an unCLIP model"),
    "LoRA of kohya": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 4)},
         "these are LoRA weights"),
    "LoRA of PEFT": ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 320)}, "these are LoRA weights"),
    "ControlNet": ({"control_model.time_embed.0.weight": (4, 4)}, "this is a ControlNet"),
    "Flux": ({"double_blocks.0.img_attn.proj.weight": (4, 4)}, "this is Stable Diffusion 3, Flux or another"),
    "textual inversion": ({"emb_params": (2, 768)}, "this is a textual inversion"),
    "word of diffusers": ({"<cat-toy>": (768,)}, "this is a textual inversion"),
    "VAE with averages": ({"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3),
                           "model_ema.decay": ()}, "this is a VAE alone"),
    "VAE": ({"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3)},
         "this is a VAE alone"),
    "UNet of a folder": ({"conv_in.weight": (4,), "down_blocks.0.a": (4,), "up_blocks.0.a": (4,)},
                         "this is the UNet alone, .* give the folder"),
    "text encoder of a folder": ({"text_model.embeddings.token_embedding.weight": (4, 4)},
                                 "this is a text encoder alone, .* give the folder"),
    "another vocabulary": ({f"{TEXT}transformer.embedding_table": (21128, 768)},
         "knows 21128 tokens.*wukong"),
    "something else": ({"a": (3,)}, "no configuration in configs/ fits it, the nearest is .* is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_without_weights(tmp_path, kind):
    content, wanted = FILES[kind]
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*model\.ckpt: [^\n]*{wanted}[^\n]*$"):
        open_weights(tmp_path / "model.ckpt")


@pytest.mark.parametrize("given", ["auto", "configs/train_dreambooth_sd_v2.yaml"])
@pytest.mark.parametrize("kind", ENTRIES)
def test_files_with_other_weights(tmp_path, kind, given):
    entries, wanted = ENTRIES[kind]
    save_file({name: torch.zeros(shape) for name, shape in entries.items()}, tmp_path / "model.safetensors")
    if given != "auto" and kind == "something else":
        wanted = "does not match the model configuration .* is missing"
    with pytest.raises(ConfigError, match=rf"^[^\n]*model\.safetensors: [^\n]*{wanted}[^\n]*$"):
        choose_config(open_weights(tmp_path / "model.safetensors"), given)


def a_folder(folder, config: ModelConfig):
    """Of configurations and empty weights: the configurations come first."""
    for name, text in folder_files(config).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):  # fmt: skip
        save_file({"a": torch.zeros(1)}, folder / part / f"{name}.safetensors")
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


OF_FOLDERS = {
    "inpainting": ("unet/config.json", {"in_channels": 9}, "this is an inpainting model"),
    "XL": ("unet/config.json", {"addition_embed_type": "text_time"}, "this is Stable Diffusion XL"),
    "unCLIP": ("unet/config.json", {"class_embed_type": "projection"}, "this is an unCLIP or another model"),
    "other activation": ("unet/config.json", {"act_fn": "gelu"}, 'unet has act_fn "gelu", .* silu'),
    "other schedule": ("scheduler/scheduler_config.json",
         {"beta_schedule": "linear"}, 'beta_schedule "linear"'),
    "zero SNR": ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True},
         "zero_terminal_snr needs a model that predicts v"),
    "sample": ("scheduler/scheduler_config.json", {"prediction_type": "sample"},
         "prediction_type must be epsilon"),
    "FLUX's VAE": ("vae/config.json", {"shift_factor": 0.1}, "vae has shift_factor 0.1"),
    "another language": ("text_encoder/config.json", {"vocab_size": 32000},
                         "32000 tokens.* another language"),
    "added words": ("text_encoder/config.json", {"vocab_size": 49409}, "49409 tokens.* words were added"),
    "other blocks": ("unet/config.json", {"down_block_types": ["SimpleCrossAttnDownBlock2D"]},
                     "unet has blocks SimpleCrossAttnDownBlock2D, this program CrossAttnDownBlock2D"),
    "unlike blocks": ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
         "not as diffusers writes"),
    "no number": ("unet/config.json", {"block_out_channels": "many"}, "not as diffusers writes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_FOLDERS)
def test_folders_of_other_models(tmp_path, kind):
    file, values, wanted = OF_FOLDERS[kind]
    folder = a_folder(tmp_path / "model", SHALLOW)
    change(folder / file, **values)
    with pytest.raises(ConfigError, match=rf"^[^\n]*model: [^\n]*{wanted}[^\n]*$"):
        choose_config(open_weights(folder))


def test_values_for_each_level_and_old_sample_sizes(tmp_path):
    folder = a_folder(tmp_path / "model", SHALLOW)
    same = {
        "layers_per_block": [1, 1],
        "cross_attention_dim": [48, 48],
        "transformer_layers_per_block": [1, 1],
    }
    change(folder / "unet/config.json", **same)
    assert config_of_folder(open_weights(folder).configs, folder) == SHALLOW
    change(folder / "unet/config.json", attention_head_dim=[2, 2])
    assert config_of_folder(open_weights(folder).configs, folder).unet.num_heads == 2
    change(folder / "unet/config.json", sample_size=32, _diffusers_version="0.8.0")
    assert config_of_folder(open_weights(folder).configs, folder).image_size == 64 * 2
    change(folder / "unet/config.json", sample_size=32, _diffusers_version="0.10.2")
    assert config_of_folder(open_weights(folder).configs, folder).image_size == 32 * 2


def test_safetensors_whose_beginning_looks_like_a_pickle(tmp_path):
    """The first bytes are the header's length."""
    for length in range(1, 2000):
        save_file({"a" * length: torch.zeros(1)}, tmp_path / "model.safetensors")
        if (tmp_path / "model.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no such file was made")
    assert list(open_weights(tmp_path / "model.safetensors").arrays) == ["a" * length]


def test_a_folder_and_a_configuration_that_say_different_things(tmp_path):
    """Both values are named."""
    folder = a_folder(tmp_path / "model", SHALLOW)
    noise, unet = SHALLOW.noise_schedule, SHALLOW.unet
    others = {
        "its prediction_type is epsilon, that of .*model.json is v_prediction": dataclasses.replace(
            SHALLOW, noise_schedule=dataclasses.replace(noise, prediction_type="v_prediction")
        ),
        "its beta_end is 0.012, that of .*model.json is 0.02": dataclasses.replace(
            SHALLOW, noise_schedule=dataclasses.replace(noise, beta_end=0.02)
        ),
        "its latent scale_factor is 0.5, that of .*model.json is 0.18": dataclasses.replace(
            SHALLOW, autoencoder=dataclasses.replace(SHALLOW.autoencoder, scale_factor=0.18)
        ),
        r"its heads in the UNet is \[2, 4\], that of .*model.json is \[4, 8\]": dataclasses.replace(
            SHALLOW, unet=dataclasses.replace(unet, head_channels=8)
        ),
    }
    for wanted, config in others.items():
        (tmp_path / "model.json").write_text(json.dumps(dataclasses.asdict(config)))
        with pytest.raises(ConfigError, match=wanted):
            choose_config(open_weights(folder), str(tmp_path / "model.json"))


def test_another_noise_schedule_in_a_file(tmp_path):
    entries = {k: torch.from_numpy(v) for k, v in weights_as_arrays(random_model(SHALLOW)).items()}
    (tmp_path / "model.json").write_text(json.dumps(dataclasses.asdict(SHALLOW)))
    ours = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for alphas, is_refused in ((ours, False), (np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), True)):
        save_file(
            entries | {"alphas_cumprod": torch.from_numpy(alphas).half()}, tmp_path / "model.safetensors"
        )
        source = open_weights(tmp_path / "model.safetensors")
        if is_refused:
            with pytest.raises(ConfigError, match="trained with another noise schedule"):
                choose_config(source, str(tmp_path / "model.json"))
        else:
            assert choose_config(source, str(tmp_path / "model.json")).config == SHALLOW
