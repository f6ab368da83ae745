"""A diffusers folder: what its JSON configurations say of the model, and writing one that
`StableDiffusionPipeline.from_pretrained` opens.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ldm.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    check_model_config,
)
from ldm.tokenizer import Tokenizer
from ldm.values import ConfigError
from ldm.weights.arrays import Arrays, Made, Renamed
from ldm.weights.layouts import DIFFUSERS, as_named_in

WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
WORDS = 49408  # of CLIP's vocabulary
BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
# What this program's networks have no place for: key -> the values that change nothing.
ONLY = {
    "unet": {
        "act_fn": ("silu", "swish"), "class_embed_type": (None,), "num_class_embeds": (None,),
        "addition_embed_type": (None,), "encoder_hid_dim": (None,), "only_cross_attention": (False,),
        "dual_cross_attention": (False,), "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",), "timestep_post_act": (None,), "conv_in_kernel": (3,),
        "conv_out_kernel": (3,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "transformer_layers_per_block": (1,), "center_input_sample": (False,), "flip_sin_to_cos": (True,),
        "freq_shift": (0,), "downsample_padding": (1,), "attention_type": ("default",),
        "cross_attention_norm": (None,), "norm_eps": (1e-5,), "mid_block_scale_factor": (1,),
        "time_cond_proj_dim": (None,),
    },
    "vae": {
        "act_fn": ("silu", "swish"), "shift_factor": (None, 0), "latents_mean": (None,),
        "latents_std": (None,), "mid_block_add_attention": (True,), "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    },
    "text_encoder": {"layer_norm_eps": (1e-5,)},
    "scheduler": {
        "beta_schedule": ("scaled_linear",), "trained_betas": (None,),
    },
}  # fmt: skip
KINDS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth-to-image model",
         7: "an upscaler"}  # fmt: skip


def config_of_folder(configs: Mapping[str, dict], folder: Path) -> ModelConfig:
    """The model that a folder's configurations describe. Raises ConfigError where it is none of this program.

    A key that is missing has the default of diffusers or transformers.
    """
    unet, vae, text, noise = (configs[part] for part in ("unet", "vae", "text_encoder", "scheduler"))
    if unet.get("addition_embed_type") == "text_time" or "text_encoder_2" in configs.get("model_index", {}):
        raise ConfigError(
            f"{folder}: this is Stable Diffusion XL; give a model of Stable Diffusion 1.4 to 2.1"
        )
    if (
        unet.get("class_embed_type")
        or unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel"
    ):
        raise ConfigError(f"{folder}: this is an unCLIP or another model; give a text-to-image model")
    if kind := KINDS.get(unet.get("in_channels", 4)):
        raise ConfigError(f"{folder}: this is {kind}; give a text-to-image model")
    words = text.get("vocab_size", WORDS)
    if words != WORDS:
        what = "words were added to it" if words > WORDS else "a model of another language"
        raise ConfigError(
            f"{folder}: its text encoder knows {words} tokens, the tokenizer {WORDS}: {what}; not read"
        )
    for part, keys in ONLY.items():
        for key, values in keys.items():
            found = configs[part].get(key, values[0])
            if not all(value in values for value in (found if isinstance(found, list) else [found])):
                raise ConfigError(
                    f"{folder}: {part} has {key} {json.dumps(found)}, this program's networks {values[0]}"
                )
    try:
        return check_model_config(_read_configs(unet, vae, text, noise, _pads_with_end(configs)), str(folder))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, ConfigError):
            text = str(error).removeprefix(f"{folder}: ")
            raise ConfigError(f"{folder}: {text}") from None
        raise ConfigError(
            f"{folder}: its configurations are not as diffusers writes them ({error!r})"
        ) from None


def _read_configs(unet: dict, vae: dict, text: dict, noise: dict, pads_with_end: bool) -> ModelConfig:
    widths = unet.get("block_out_channels", (320, 640, 1280, 1280))
    for key in ("down_block_types", "up_block_types"):
        if unknown := set(unet.get(key, ())) - set(BLOCKS):
            raise ConfigError(
                f"unet has blocks {', '.join(sorted(unknown))}, this program {', '.join(BLOCKS)}"
            )
    down = unet.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    attends = [{"CrossAttnDownBlock2D": True, "DownBlock2D": False}[kind] for kind in down]
    up = unet.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    if [{"CrossAttnUpBlock2D": True, "UpBlock2D": False}[kind] for kind in up] != attends[::-1]:
        raise ValueError("up_block_types")
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    if isinstance(heads, list) and len(set(heads)) == 1:
        heads = heads[0] if len(heads) > 1 else heads
    sizes = {width // count for width, count in zip(widths, heads)} if isinstance(heads, list) else {0}
    if len(sizes) != 1:
        raise ValueError("attention_head_dim")
    vae_widths = vae.get("block_out_channels", (64,))
    downsampling = 2 ** (len(vae_widths) - 1)
    steps, act = noise.get("num_train_timesteps", 1000), text.get("hidden_act", "quick_gelu")
    return ModelConfig(
        image_size=_sample_size(unet, 512 // downsampling) * downsampling,
        unet=UNetConfig(
            in_channels=unet.get("in_channels", 4),
            out_channels=unet.get("out_channels", 4),
            model_channels=widths[0],
            channel_mult=tuple(_whole(width, widths[0]) for width in widths),
            num_res_blocks=_one(unet.get("layers_per_block", 2)),
            attention_resolutions=tuple(2**level for level, attending in enumerate(attends) if attending),
            head_channels=sizes.pop() or None,
            num_heads=None if isinstance(heads, list) else heads,
            context_dim=_one(unet.get("cross_attention_dim", 1280)),
            norm_groups=unet.get("norm_num_groups", 32),
            dropout=float(unet.get("dropout", 0.0)),
            use_linear_projection=bool(unet.get("use_linear_projection", False)),
            upcast_attention=bool(unet.get("upcast_attention", False)),
        ),
        autoencoder=AutoencoderConfig(
            image_channels=vae.get("in_channels", 3),
            latent_channels=vae.get("latent_channels", 4),
            base_channels=vae_widths[0],
            channel_mult=tuple(_whole(width, vae_widths[0]) for width in vae_widths),
            num_res_blocks=vae.get("layers_per_block", 1),
            scale_factor=float(vae.get("scaling_factor", 0.18215)),
            norm_groups=vae.get("norm_num_groups", 32),
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=text.get("vocab_size", 49408),
            context_length=text.get("max_position_embeddings", 77),
            width=text.get("hidden_size", 512),
            heads=text.get("num_attention_heads", 8),
            layers=text.get("num_hidden_layers", 12),
            activation=act,
            padding="end" if (act == "quick_gelu" if pads_with_end is None else pads_with_end) else "zero",
        ),
        noise_schedule=ScheduleConfig(
            timesteps=steps,
            beta_start=float(noise.get("beta_start", 0.0001)),
            beta_end=float(noise.get("beta_end", 0.02)),
            prediction_type=noise.get("prediction_type", "epsilon"),
            zero_terminal_snr=noise.get("rescale_betas_zero_snr", False),
        ),
    )


def _sample_size(unet: dict, default: int) -> int:
    """Of the latents. Less than 64 from diffusers before 0.9 means 64, as its own pipeline has it."""
    size, version = _one(unet.get("sample_size")) or default, str(unet.get("_diffusers_version", ""))
    is_older = version.startswith(tuple(f"0.{minor}." for minor in range(9)))
    return max(size, 64) if is_older else size


def _one(value):
    """A value that may be given for each level, all the same."""
    if isinstance(value, list):
        if len({str(item) for item in value}) != 1:
            raise ValueError(f"{value} differs from level to level")
        return value[0]
    return value


def _whole(width: int, base: int) -> int:
    if width % base:
        raise ValueError(f"block_out_channels {width} is no multiple of {base}")
    return width // base


def _pads_with_end(configs: Mapping[str, dict]) -> bool | None:
    """By the folder's tokenizer; of two files the first one counts, as transformers has it."""
    for name in ("tokenizer/special_tokens_map", "tokenizer/tokenizer_config"):
        token = configs.get(name, {}).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ("!", "<|endoftext|>"):
            return token == "<|endoftext|>"
    return None


def diffusers_configs(config: ModelConfig) -> dict[str, dict]:
    """Folder to the JSON configuration with which diffusers and transformers build the same networks."""
    unet, vae, text, noise = config.unet, config.autoencoder, config.text_encoder, config.noise_schedule
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in range(len(widths))]
    predicts_v = noise.prediction_type == "v_prediction"
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
            # diffusers calls the number of heads so
            "attention_head_dim": unet.num_heads or [unet.heads(width) for width in widths],
            "use_linear_projection": unet.use_linear_projection,
            "upcast_attention": unet.upcast_attention,
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
            "hidden_act": text.activation,
            "projection_dim": text.width,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": 0,
        },
        "scheduler": {
            "_class_name": "DDIMScheduler"
            if predicts_v
            else "PNDMScheduler",  # as Stability's folders have it
            "num_train_timesteps": noise.timesteps,
            "beta_start": noise.beta_start,
            "beta_end": noise.beta_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": noise.prediction_type,
            **({} if predicts_v else {"skip_prk_steps": True}),
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **(
                {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
                if noise.zero_terminal_snr
                else {}
            ),
        },
    }


def _tokenizer_files(config: ModelConfig) -> dict[str, str]:
    text = config.text_encoder
    tokenizer = Tokenizer(text.context_length)
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    marks["pad_token"] = "<|endoftext|>" if text.padding == "end" else "!"  # which has the id 0
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text.context_length,
        "do_lower_case": True,
    }
    return {
        "vocab.json": json.dumps(tokenizer.vocabulary(), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *tokenizer.merges()]) + "\n",
        "special_tokens_map.json": _as_json(marks),
        "tokenizer_config.json": _as_json(marks | settings),
    }


def _as_json(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


def folder_files(config: ModelConfig) -> dict[str, str]:
    """Path in the folder to text, of all its files but the weights."""
    configs = diffusers_configs(config)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    files = {"model_index.json": _as_json(index)}
    for part, settings in configs.items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        files[f"{part}/{name}"] = _as_json(settings)
    return files | {f"tokenizer/{name}": text for name, text in _tokenizer_files(config).items()}


def as_diffusers(arrays: Arrays, config: ModelConfig) -> dict[str, Renamed]:
    """Subfolder to its parameters, from official names: views, nothing is read."""
    whole = as_named_in(DIFFUSERS, arrays, config)
    parts: dict[str, dict[str, Made]] = {part: {} for part in WEIGHT_FILES}
    for name in whole:
        part, _, own = name.partition("/")
        parts[part][own] = Made([name], whole.shape(name))
    return {part: Renamed(whole, made) for part, made in parts.items()}
