"""Which model a file is: told from the names and shapes in it, a folder of diffusers from its configurations.

Nothing but shapes is read. A file does not say what its UNet predicts or how many heads it has: those come
from the configuration that fits its shapes.
"""

from collections.abc import Iterator

from ldm.config import ModelConfig
from ldm.weights.arrays import Arrays
from ldm.weights.layouts import (
    CLIP,
    DIFFUSERS,
    STATE_PREFIXES,
    TABLE,
    common_spelling,
    joined_shape,
    layout_of,
    names_in,
)

FIRST_CONV = "model.diffusion_model.input_blocks.0.0.conv.weight"
POSITIONS = "cond_stage_model.transformer.positional_embedding"
BY_INPUT_CHANNELS = {5: "a depth-to-image model", 8: "an instruct-pix2pix model", 9: "an inpainting model"}
IMAGE_MODELS = "give a text-to-image model of Stable Diffusion 1.4 to 2.1"
WORDS = 49408  # of CLIP's vocabulary


def key_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Some parameters whose shapes together tell one model from another."""
    unet, vae, text = config.unet, config.autoencoder, config.text_encoder
    width, levels = unet.model_channels, len(unet.channel_mult)
    deepest, last_block = width * unet.channel_mult[-1], levels * (unet.num_res_blocks + 1) - 1
    vae_width, level = vae.base_channels * vae.channel_mult[-1], len(vae.channel_mult) - 1
    model, stage = "model.diffusion_model.", "first_stage_model."
    layer = f"cond_stage_model.transformer.transformer_layer.resblocks.{text.layers - 1}"
    return {
        FIRST_CONV: (width, unet.in_channels, 3, 3),
        f"{model}out.2.conv.weight": (unet.out_channels, width, 3, 3),
        f"{model}middle_block.0.in_layers_conv.conv.weight": (deepest, deepest, 3, 3),
        f"{model}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (deepest, unet.context_dim),
        f"{model}output_blocks.{last_block}.0.out_layers_conv.conv.weight": (width, width, 3, 3),
        f"{stage}encoder.conv_in.weight": (vae.base_channels, vae.image_channels, 3, 3),
        f"{stage}decoder.conv_in.weight": (vae_width, vae.latent_channels, 3, 3),
        f"{stage}encoder.down.{level}.block.{vae.num_res_blocks - 1}.conv2.weight": (
            vae_width,
            vae_width,
            3,
            3,
        ),
        TABLE: (text.vocab_size, text.width),
        POSITIONS: (text.context_length, text.width),
        f"{layer}.c_fc.weight": (4 * text.width, text.width),
    }


class Shapes:
    """The shapes in a file, by official names."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays, self.layout = arrays, layout_of(arrays)
        self.own = {common_spelling(name): name for name in arrays}
        self.is_open_clip = f"{CLIP}embeddings.token_embedding.weight" not in self.own

    def entries(self, name: str, config: ModelConfig | None = None) -> list[str] | None:
        """The entries that are an official parameter; None where the file has no such one."""
        if self.layout == DIFFUSERS and config is None:
            return None
        parts = [self.own.get(part) for part in names_in(self.layout, name, config, self.is_open_clip)]
        return None if None in parts else parts

    def of(self, name: str, config: ModelConfig | None = None) -> tuple[int, ...] | None:
        """None where the file has no such parameter."""
        parts = self.entries(name, config)
        return parts and joined_shape(self.arrays, parts)

    def fit(self, config: ModelConfig) -> bool:
        return not any(self.differences(config))

    def differences(self, config: ModelConfig) -> Iterator[str]:
        for name, shape in key_shapes(config).items():
            found = self.of(name, config)
            if found != shape:
                yield f"{name} is {'missing' if found is None else found}, must be {shape}"


def what_it_is(arrays: Arrays) -> str | None:
    """What else than a text-to-image model of Stable Diffusion 1 or 2 a file is, and what to do; None where
    nothing is known of it.
    """
    shapes = Shapes(arrays)
    for is_it, text in (*_kinds_by_name(arrays), *_kinds_by_shape(shapes)):
        if is_it:
            return text
    return None


def _kinds_by_name(arrays: Arrays) -> Iterator[tuple[bool, str]]:
    """(whether it is that, what and what to do)."""
    begins = {name.split(".")[0] for name in arrays}

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in arrays)

    def contains(*parts: str) -> bool:
        return any(part in name for part in parts for name in arrays)

    yield not begins, "it has no weights in it: get it again"
    yield (
        contains("lora_down", "lora_up", ".lora_A.") or has("lora_"),
        (
            "these are LoRA weights, a small addition to a base model: give that here, and this file with "
            "--lora_ckpt_path"
        ),
    )
    is_xl = has("conditioner.embedders.1.") or (has("conditioner.") and contains(".label_emb."))
    yield is_xl, f"this is Stable Diffusion XL; {IMAGE_MODELS}"
    is_unclip = contains(".label_emb.") or has("embedder.model.")
    yield is_unclip, "this is an unCLIP model, which generates from images; give a text-to-image model"
    yield has("depth_model."), "this is a depth-to-image model; give a text-to-image model"
    yield has("control_model."), f"this is a ControlNet, an addition to a model; {IMAGE_MODELS}"
    transformers = ("double_blocks.", "joint_blocks.", "transformer_blocks.")
    is_transformer = has(*transformers, *(f"model.diffusion_model.{name}" for name in transformers))
    yield is_transformer, f"this is Stable Diffusion 3, Flux or another transformer; {IMAGE_MODELS}"
    is_word = {"string_to_param", "emb_params", "clip_l"} & set(arrays) or _are_words(arrays)
    yield bool(is_word), f"this is a textual inversion, a word for a model and no model; {IMAGE_MODELS}"
    of_vae = {"encoder", "decoder", "quant_conv", "post_quant_conv", "loss", "first_stage_model", "model_ema"}
    is_vae = begins <= of_vae and {"encoder", "first_stage_model"} & begins and not has("encoder.layers.")
    yield bool(is_vae), f"this is a VAE alone; {IMAGE_MODELS}"
    part = "one file of a diffusers folder; give the folder that holds unet/, vae/ and text_encoder/"
    yield {"down_blocks", "up_blocks"} <= begins, f"this is the UNet alone, {part}"
    is_text = begins == {"text_model"} or begins == {"embeddings", "encoder", "final_layer_norm"}
    yield is_text, f"this is a text encoder alone, {part}"


def _are_words(arrays: Arrays) -> bool:
    """One or two vectors of a text encoder's width, under the name of a new word."""
    return 0 < len(arrays) <= 2 and all(
        arrays.shape(name)[-1:] in ((768,), (1024,)) and len(arrays.shape(name)) <= 2 and "." not in name
        for name in arrays
    )


def _kinds_by_shape(shapes: Shapes) -> Iterator[tuple[bool, str]]:
    first, table = shapes.of(FIRST_CONV) or (), shapes.of(TABLE) or (WORDS,)
    kind = BY_INPUT_CHANNELS.get(first[1]) if len(first) == 4 else None
    yield kind is not None, f"this is {kind}; give a text-to-image model"
    yield (
        table[0] != WORDS,
        (
            f"its text encoder knows {table[0]} tokens, the tokenizer {WORDS}: a model of another language, "
            f"such as wukong-huahua, is not read"
        ),
    )
    is_state = any(name.startswith(STATE_PREFIXES) for name in shapes.arrays)
    yield (
        is_state and shapes.of("first_stage_model.decoder.conv_out.weight") is None,
        (
            "this is the saved state of a training, not a whole model: continue that training with --resume, "
            "give one of its checkpoints (dreambooth_epoch_*), or make one with scripts/weights_of_state.py"
        ),
    )
