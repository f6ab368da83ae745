"""The model configurations of mindone's 2023 examples, `model: {target, params}`: their values in this
program's layout.

Nothing that such a file names is imported. Must not import mindspore.
"""

import logging
from collections.abc import Mapping

SAME_IN_UNET = (
    "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks",
    "attention_resolutions", "context_dim",
)  # fmt: skip
logger = logging.getLogger(__name__)
UNET, VAE = "UNetModel", "AutoencoderKL"
# the last, with a width of 1024, is SD2's in early files
TEXT = (
    "FrozenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenCLIPEmbedder_ZH",
)
PREDICTIONS = {
    "eps": "epsilon", "noise": "epsilon", "epsilon": "epsilon", "v": "v_prediction",
    "velocity": "v_prediction",
    "v_prediction": "v_prediction",
}  # fmt: skip


def is_mindone(given: Mapping) -> bool:
    return isinstance(given.get("model"), dict) and {"target", "params"} <= given["model"].keys()


def from_mindone(given: Mapping) -> dict:
    """The mapping that a `ModelConfig` is built from.

    What the file leaves out is as mindone's networks have it by default.

    Raises:
        ValueError: it describes networks that this program does not have.
    """
    try:
        model, params = given["model"], given["model"]["params"]
        parts = [
            (params[f"{part}_config"]["target"], params[f"{part}_config"].get("params") or {})
            for part in ("unet", "first_stage", "cond_stage")
        ]
        (unet_target, unet), (vae_target, vae), (text_target, text) = parts
        sizes = vae["ddconfig"]
        is_half = params.get("use_fp16", unet.get("use_fp16"))
        is_v1 = bool(text.get("use_quick_gelu", text.get("width", unet["context_dim"]) == 768))
        prediction = params.get("parameterization", model.get("prediction_type", "eps"))
        wrong = [
            (unet_target.split(".")[-1] != UNET, f"unet_config is a {unet_target}"),
            (vae_target.split(".")[-1] != VAE, f"first_stage_config is a {vae_target}"),
            (text_target.split(".")[-1] not in TEXT, f"cond_stage_config is a {text_target}"),
            (not {"num_head_channels", "num_heads"} & unet.keys(), "its UNet has no number of heads"),
            (unet.get("transformer_depth", 1) != 1, f"transformer_depth is {unet.get('transformer_depth')}"),
            (bool(sizes.get("attn_resolutions")), "its VAE has attention at several resolutions"),
            (prediction not in PREDICTIONS, f"parameterization is {prediction}"),
        ]
        for is_wrong, what in wrong:
            if is_wrong:
                raise ValueError(what)
        return {
            "image_size": params["image_size"] * 2 ** (len(sizes["ch_mult"]) - 1),  # there of the latents
            **({"use_fp16": bool(is_half)} if is_half is not None else {}),
            "unet": {
                **{key: unet[key] for key in SAME_IN_UNET},
                "head_channels": unet.get("num_head_channels"),
                "num_heads": None if "num_head_channels" in unet else unet["num_heads"],
                "dropout": unet.get("dropout", 0.0),
                "use_linear_projection": bool(unet.get("use_linear_in_transformer", False)),
            },
            "autoencoder": {
                "image_channels": sizes["in_channels"],
                "latent_channels": sizes["z_channels"],
                "base_channels": sizes["ch"],
                "channel_mult": sizes["ch_mult"],
                "num_res_blocks": sizes["num_res_blocks"],
                "scale_factor": params["scale_factor"],
            },
            "text_encoder": {
                "vocab_size": text.get("vocab_size", 49408),
                "context_length": text.get("context_length", 77),
                "width": text.get("width", unet["context_dim"]),
                "heads": text.get("heads", 12 if is_v1 else 16),
                "layers": text.get("layers", 12 if is_v1 else 23),
                "activation": "quick_gelu" if is_v1 else "gelu",
                "padding": "end" if is_v1 else "zero",
            },
            "noise_schedule": {
                "timesteps": params.get("timesteps", 1000),
                "beta_start": params["linear_start"],
                "beta_end": params["linear_end"],
                "prediction_type": PREDICTIONS[prediction],
            },
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{error.args[0] if isinstance(error, KeyError) else error} is missing or not as expected"
        ) from None


def say_what_is_new(warmup_steps: int, dropout: float) -> None:
    """Log what configuration files of 2023 bring with them and have not had the same effect then."""
    if warmup_steps:
        text = (
            "warming up over the first %d updates (the 2023 example ignored warmup_steps: its rate was "
            "constant, as with 0)"
        )
        logger.info(text, warmup_steps)
    if dropout:
        text = (
            "dropout %g: what it drops differs from run to run, so no run is repeated or resumed bit by bit"
        )
        logger.warning(text, dropout)
