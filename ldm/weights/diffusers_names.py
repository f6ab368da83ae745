"""The names that diffusers and transformers give to the same parameters, for conversion in both directions.

NumPy only.
"""

import re
from collections.abc import Mapping

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


def replace_parts(name: str, parts: Mapping[str, str]) -> str:
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
            return f"{where}.resnets.{place}.{replace_parts(rest, RESNET)}"
        return f"{where}.attentions.{place}.{rest}"
    if head == "middle_block":
        layer, _, rest = tail.partition(".")
        where = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[layer]
        return f"mid_block.{where}.{replace_parts(rest, RESNET) if layer != '1' else rest}"
    outer = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    return replace_parts(name, outer | {"out.0": "conv_norm_out", "out.2.conv": "conv_out"})


def _vae_name(name: str, config: ModelConfig) -> str:
    last = len(config.autoencoder.channel_mult) - 1
    name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{last - int(m[1])}.", name)
    return replace_parts(re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name), VAE_PARTS)


def diffusers_names(name: str, config: ModelConfig) -> tuple[str, list[str]]:
    """(folder, names there) of an official parameter; a joined q, k, v projection has three."""
    spelled = spelled_norms(name)
    if spelled.startswith(UNET):
        return "unet", [_unet_name(spelled.removeprefix(UNET), config)]
    if spelled.startswith(VAE):
        return "vae", [_vae_name(spelled.removeprefix(VAE), config)]
    return "text_encoder", text_names(spelled, "text_model.")


def spelled_norms(name: str) -> str:
    """A norm's `gamma` and `beta` as `weight` and `bias`, as all others call them."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def text_names(spelled: str, prefix: str) -> list[str]:
    """In the names of transformers' CLIPTextModel."""
    text = prefix + replace_parts(spelled.removeprefix(TEXT), TEXT_PARTS)
    if "attn.attn.in_proj" in text:
        return [text.replace("attn.attn.in_proj", f"self_attn.{part}_proj") for part in "qkv"]
    return [text]
