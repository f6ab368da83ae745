"""Names and configurations in diffusers' layout, for conversion in both directions. NumPy only.

A diffusers folder holds `unet/`, `vae/`, `text_encoder/` and `scheduler/`, each with its JSON configuration.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ldm.config import ModelConfig
from ldm.weights.mindspore_ckpt import WeightFile
from ldm.weights.torch_pickle import read_torch_file

WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
RESNET = {
    "in_layers_norm": "norm1", "in_layers_conv.conv": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers_norm": "norm2", "out_layers_conv.conv": "conv2", "skip_connection.conv": "conv_shortcut",
}  # fmt: skip
VAE_PARTS = {
    "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1", "nin_shortcut": "conv_shortcut",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k", "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", "norm_out": "conv_norm_out",
    "downsample.conv": "downsamplers.0.conv", "upsample.conv": "upsamplers.0.conv",
}  # fmt: skip
VAE_PARTS_OF_2022 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # as diffusers named them at first
TEXT_PARTS = {
    "embedding_table": "embeddings.token_embedding.weight", "ln_final": "final_layer_norm",
    "positional_embedding": "embeddings.position_embedding.weight", "transformer_layer.resblocks": "encoder.layers",
    "attn.attn.out_proj": "self_attn.out_proj", "c_fc": "mlp.fc1", "c_proj": "mlp.fc2", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
}  # fmt: skip


def _replace(name: str, parts: Mapping[str, str]) -> str:
    """Dotted sub-sequences of a name, replaced."""
    for old, new in parts.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def _unet_name(name: str, config: ModelConfig) -> str:
    stride = config.unet.num_res_blocks + 1
    head, _, tail = name.partition(".")
    if head in ("input_blocks", "output_blocks"):
        index, layer, rest = tail.split(".", 2)
        index, layer = int(index), int(layer)
        if head == "input_blocks" and index == 0:
            return rest.replace("conv.", "conv_in.")
        level, place = divmod(index - 1, stride) if head == "input_blocks" else divmod(index, stride)
        where = f"{'down' if head == 'input_blocks' else 'up'}_blocks.{level}"
        if rest.startswith("op.conv."):
            return f"{where}.downsamplers.0.{rest[3:]}"
        if rest.startswith("conv.conv."):
            return f"{where}.upsamplers.0.{rest[5:]}"
        if layer == 0:
            return f"{where}.resnets.{place}.{_replace(rest, RESNET)}"
        return f"{where}.attentions.{place}.{rest}"
    if head == "middle_block":
        layer, _, rest = tail.partition(".")
        where = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[layer]
        return f"mid_block.{where}.{_replace(rest, RESNET) if layer != '1' else rest}"
    outer = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    return _replace(name, outer | {"out.0": "conv_norm_out", "out.2.conv": "conv_out"})


def _vae_name(name: str, config: ModelConfig) -> str:
    last = len(config.autoencoder.channel_mult) - 1
    name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{last - int(m[1])}.", name)
    return _replace(re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name), VAE_PARTS)


def diffusers_names(name: str, config: ModelConfig) -> tuple[str, list[str]]:
    """(folder, names there) of an official parameter; a joined q, k, v projection has three."""
    spelled = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    if spelled.startswith(UNET):
        return "unet", [_unet_name(spelled.removeprefix(UNET), config)]
    if spelled.startswith(VAE):
        return "vae", [_vae_name(spelled.removeprefix(VAE), config)]
    text = "text_model." + _replace(spelled.removeprefix(TEXT), TEXT_PARTS)
    if "attn.attn.in_proj" in text:
        return "text_encoder", [text.replace("attn.attn.in_proj", f"self_attn.{part}_proj") for part in "qkv"]
    return "text_encoder", [text]


def to_diffusers(weights: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """Folder to parameters, from official names. The VAE's attention projections become matrices."""
    result: dict[str, dict[str, np.ndarray]] = {folder: {} for folder in WEIGHT_FILES}
    for name, value in weights.items():
        folder, names = diffusers_names(name, config)
        if folder == "vae" and ".mid.attn_1." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        for part, array in zip(names, np.split(value, len(names))):
            result[folder][part] = array
    return result


def from_diffusers(folders: Mapping[str, Mapping[str, np.ndarray]], shapes: Mapping[str, tuple], config: ModelConfig) -> dict:
    """Official names to arrays, for the names and shapes of the model. Raises ValueError for missing or unused names."""
    text = folders["text_encoder"]
    prefix = "" if any(name.startswith("text_model.") for name in text) else "text_model."  # transformers 5 drops it
    left = {folder: dict(given) for folder, given in folders.items()} | {
        "text_encoder": {prefix + name: value for name, value in text.items()}
    }
    left["text_encoder"].pop("text_model.embeddings.position_ids", None)  # a buffer, not a weight
    left["vae"] = {_replace(name, VAE_PARTS_OF_2022) if ".attentions." in name else name: value for name, value in left["vae"].items()}
    weights, missing = {}, []
    for name, shape in shapes.items():
        folder, names = diffusers_names(name, config)
        parts = [left[folder].pop(part, None) for part in names]
        if any(part is None for part in parts):
            missing.append(f"{folder}: {names[0]}")
            continue
        value = np.concatenate(parts)
        weights[name] = value.reshape(shape) if value.size == np.prod(shape) else value
    extra = [f"{folder}: {name}" for folder, names in left.items() for name in names]
    if missing or extra:
        raise ValueError(
            f"the diffusers folder does not fit the model configuration: {len(missing)} parameters missing {missing[:3]}, "
            f"{len(extra)} not of this model {extra[:3]}"
        )
    return weights


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
        older = path.with_name(name.replace("model.safetensors", "pytorch_model.bin") if part == "text_encoder" else f"{path.stem}.bin")
        if path.is_file():
            try:
                result[part] = WeightFile(path)
            except ValueError as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        elif older.is_file():
            result[part] = read_torch_file(older)
        else:
            raise FileNotFoundError(f"{path}: no such file, nor {older.name}; a folder in diffusers' layout is wanted")
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
            save_file({k: np.ascontiguousarray(v) for k, v in parts[part].items()}, folder / part / WEIGHT_FILES[part], {"format": "pt"})
