"""The names that diffusers and transformers give to the same parameters, for conversion in both directions.

NumPy only.
"""

import re
from collections.abc import Mapping

import numpy as np

from ldm.config import ModelConfig

FOLDERS = ("unet", "vae", "text_encoder")
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
RESNET = {
    "in_layers_norm": "norm1", "in_layers_conv.conv": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers_norm": "norm2", "out_layers_conv.conv": "conv2", "skip_connection.conv": "conv_shortcut",
}  # fmt: skip
VAE_PARTS = {
    "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
    "nin_shortcut": "conv_shortcut",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k", "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", "norm_out": "conv_norm_out",
    "downsample.conv": "downsamplers.0.conv", "upsample.conv": "upsamplers.0.conv",
}  # fmt: skip
# as diffusers named them at first
VAE_PARTS_OF_2022 = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
TEXT_PARTS = {
    "embedding_table": "embeddings.token_embedding.weight", "ln_final": "final_layer_norm",
    "positional_embedding": "embeddings.position_embedding.weight",
    "transformer_layer.resblocks": "encoder.layers",
    "attn.attn.out_proj": "self_attn.out_proj", "c_fc": "mlp.fc1", "c_proj": "mlp.fc2", "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
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
    result: dict[str, dict[str, np.ndarray]] = {folder: {} for folder in FOLDERS}
    for name, value in weights.items():
        folder, names = diffusers_names(name, config)
        if folder == "vae" and ".mid.attn_1." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        for part, array in zip(names, np.split(value, len(names))):
            result[folder][part] = array
    return result


def from_diffusers(
    folders: Mapping[str, Mapping[str, np.ndarray]], shapes: Mapping[str, tuple], config: ModelConfig
) -> dict:
    """Official names to arrays, for the names and shapes of the model.

    Raises ValueError for missing or unused names.
    """
    text = folders["text_encoder"]
    # transformers 5 drops it
    prefix = "" if any(name.startswith("text_model.") for name in text) else "text_model."
    left = {folder: dict(given) for folder, given in folders.items()} | {
        "text_encoder": {prefix + name: value for name, value in text.items()}
    }
    left["text_encoder"].pop("text_model.embeddings.position_ids", None)  # a buffer, not a weight
    left["vae"] = {
        _replace(name, VAE_PARTS_OF_2022) if ".attentions." in name else name: value
        for name, value in left["vae"].items()
    }
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
            f"the diffusers folder does not match the model configuration: {len(missing)} parameters missing "
            f"{missing[:3]}, "
            f"{len(extra)} not of this model {extra[:3]}"
        )
    return weights
