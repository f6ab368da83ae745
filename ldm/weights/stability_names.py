"""The names of the same parameters in single files of CompVis and Stability, which most programs read."""

import re

from ldm.weights.diffusers_names import TEXT, UNET, replace_parts, spelled_norms, text_names

UNET_PARTS = {
    "in_layers_norm": "in_layers.0", "in_layers_conv.conv": "in_layers.2",
    "out_layers_norm": "out_layers.0", "out_layers_conv.conv": "out_layers.3",
    "op.conv": "op", "skip_connection.conv": "skip_connection",
}  # fmt: skip
# the first convolution and the last one, and those after an up-sampling
OUTER_CONV = re.compile(r"(\.input_blocks\.0\.0|\.out\.2|\.output_blocks\.\d+\.\d\.conv)\.conv\.")
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
OPEN_CLIP_PARTS = {
    "embedding_table": "token_embedding.weight", "transformer_layer.resblocks": "transformer.resblocks",
    "attn.attn.in_proj.weight": "attn.in_proj_weight", "attn.attn.in_proj.bias": "attn.in_proj_bias",
    "attn.attn.out_proj": "attn.out_proj", "c_fc": "mlp.c_fc", "c_proj": "mlp.c_proj",
}  # fmt: skip


def stability_names(name: str, is_open_clip: bool) -> list[str]:
    """The names of an official parameter in a single file; a joined q, k, v projection can have three.

    Args:
        is_open_clip: the text encoder has OpenCLIP's names (SD2), not those of transformers (SD1).
    """
    spelled = spelled_norms(name)
    if spelled.startswith(UNET):
        spelled = replace_parts(spelled, UNET_PARTS)
        return [OUTER_CONV.sub(r"\1.", spelled)]
    if spelled.startswith(TEXT) and is_open_clip:
        return [OPEN_CLIP + replace_parts(spelled.removeprefix(TEXT), OPEN_CLIP_PARTS)]
    if spelled.startswith(TEXT):
        return text_names(spelled, CLIP)
    return [spelled]


def averaged_name(name: str) -> str:
    """Of the moving average beside a parameter of the UNet, as Stability's training stores it: no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
