"""A diffusers folder: `unet/`, `vae/`, `text_encoder/` and `scheduler/`, each with its JSON configuration,
read and written.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ldm.config import ModelConfig
from ldm.weights.diffusers_names import to_diffusers
from ldm.weights.safetensors_files import read_safetensors, write_safetensors
from ldm.weights.torch_pickle import read_torch_file

WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def diffusers_configs(config: ModelConfig) -> dict[str, dict]:
    """Folder to the JSON configuration with which diffusers and transformers build the same networks."""
    unet, vae, text, noise = config.unet, config.autoencoder, config.text_encoder, config.noise_schedule
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in range(len(widths))]
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": config.image_size // vae.downsampling,
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "block_out_channels": widths,
            "layers_per_block": unet.num_res_blocks,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "cross_attention_dim": unet.context_dim,
            "attention_head_dim": [width // unet.head_channels for width in widths],
            "use_linear_projection": True,
            "norm_num_groups": unet.norm_groups,
            "dropout": unet.dropout,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "sample_size": config.image_size,
            "in_channels": vae.image_channels,
            "out_channels": vae.image_channels,
            "latent_channels": vae.latent_channels,
            "block_out_channels": [vae.base_channels * mult for mult in vae.channel_mult],
            "layers_per_block": vae.num_res_blocks,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
            "norm_num_groups": vae.norm_groups,
            "scaling_factor": vae.scale_factor,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "hidden_act": "gelu",
            "projection_dim": text.width,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": 0,
        },
        "scheduler": {
            "_class_name": "PNDMScheduler",
            "num_train_timesteps": noise.timesteps,
            "beta_start": noise.beta_start,
            "beta_end": noise.beta_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": noise.prediction_type,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    }


def read_diffusers_folder(folder: Path) -> dict[str, Mapping[str, np.ndarray]]:
    """The weights in a diffusers folder, from safetensors files or, where there are none, PyTorch's .bin.

    Raises:
        FileNotFoundError: a part has neither.
        ValueError: a file is damaged, or a .bin holds anything but tensors.
    """
    result = {}
    for part, name in WEIGHT_FILES.items():
        path = folder / part / name
        older = path.with_name(
            name.replace("model.safetensors", "pytorch_model.bin")
            if part == "text_encoder"
            else f"{path.stem}.bin"
        )
        if path.is_file():
            try:
                result[part] = read_safetensors(path)
            except ValueError as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        elif older.is_file():
            result[part] = read_torch_file(older)
        else:
            raise FileNotFoundError(
                f"{path}: no such file, nor {older.name}; the folder must be in the layout of diffusers"
            )
    return result


def write_diffusers_folder(folder: Path, weights: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    """Write weights and configurations into a new folder. Raises FileExistsError where it exists already."""
    folder.mkdir(parents=True)
    parts, configs = to_diffusers(weights, config), diffusers_configs(config)
    for part, settings in configs.items():
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(settings, indent=2) + "\n")
        if part in parts:
            write_safetensors(parts[part], folder / part / WEIGHT_FILES[part], {"format": "pt"})
