"""The three ways to name a model's parameters, told apart by the names alone, and how a model's arrays are
found in a file of any of them, or named as in one.

A file holds more than a network takes. What is known to be of no use is left out; an entry that is neither
needed nor listed here is unknown, and refuses the file. Knows names and shapes only.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from ldm.config import ModelConfig
from ldm.weights.arrays import Arrays, Made, Renamed
from ldm.weights.diffusers_names import FOLDERS, VAE_PARTS_OF_2022, diffusers_names, replace_parts
from ldm.weights.stability_names import CLIP, OPEN_CLIP, averaged_name, stability_names

MINDSPORE, STABILITY, DIFFUSERS = "mindspore", "stability", "diffusers"
TABLE = "cond_stage_model.transformer.embedding_table"
TEXT_LAYERS = "cond_stage_model.transformer.transformer_layer.resblocks."
TEXT_LAYER = re.compile(re.escape(TEXT_LAYERS) + r"(\d+)\.")
VAE_LEVEL = re.compile(r"first_stage_model\.encoder\.down\.(\d+)\.")
FLAT_CLIP = re.compile(
    r"^(cond_stage_model\.transformer\.|text_encoder/)(?=embeddings\.|encoder\.|final_layer_norm\.)"
)
# mindone's and MindSpore's training steps, saved whole: optimizer moments, averages, accumulated gradients;
# counters and scalars.
STATE_PREFIXES = ("adam_m.", "moment1.", "lion_m.", "adafactor_row.", "prodigy_m.")
STEP_PREFIXES = (
    *STATE_PREFIXES, "adam_v.", "moment2.", "adafactor_column.", "prodigy_v.", "prodigy_s.", "prodigy_start.",
    "ema.", "swap.", "grad_accumulated_", "zeros_",
)  # fmt: skip
STEP_SCALARS = {
    "learning_rate", "beta1_power", "beta2_power", "global_step", "scale_sense", "current_iterator_step",
    "last_overflow_iterator_step", "epoch_num", "cur_step", "loss_scale", "updates",
}  # fmt: skip
SCHEDULE = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "scale_factor", "logvar", "lvlb_weights", "v_pred",
}  # fmt: skip
# of the text encoder, that Stable Diffusion never reads
TEXT_EXTRAS = {
    f"{OPEN_CLIP}text_projection", f"{OPEN_CLIP}logit_scale", f"{OPEN_CLIP}attn_mask",
    "cond_stage_model.transformer.text_projection.weight", "cond_stage_model.logit_scale",
    "cond_stage_model.transformer.logit_scale", "text_encoder/text_projection.weight",
    "text_encoder/logit_scale",
}  # fmt: skip


def layout_of(names: Iterable[str]) -> str:
    """How the parameters of a file are named; MINDSPORE where nothing tells."""
    for name in names:
        if name.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            return DIFFUSERS
        if ".in_layers_norm." in name or name == TABLE:
            return MINDSPORE
        if ".in_layers.0." in name or name.startswith((CLIP, OPEN_CLIP, "conditioner.")):
            return STABILITY
    return MINDSPORE


def common_spelling(name: str) -> str:
    """A name as most files of its layout have it."""
    for old, new in (("conditioner.embedders.0.model.", OPEN_CLIP),  # ComfyUI, for SD2
                     (f"{OPEN_CLIP}transformer.text_model.", CLIP)):  # fmt: skip
        if name.startswith(old):
            name = new + name.removeprefix(old)
    # transformers 5.6 and later, and very old ones
    name = FLAT_CLIP.sub(r"\1text_model.", name)
    if name.startswith("first_stage_model.") and ".mid.attn_1.to_" in name:  # as diffusers names them
        for new, old in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            name = name.replace(f".mid.attn_1.{new}.", f".mid.attn_1.{old}.")
    if name.startswith("vae/") and ".attentions." in name:
        name = replace_parts(name, VAE_PARTS_OF_2022)
    return name


def names_in(layout: str, name: str, config: ModelConfig, is_open_clip: bool) -> list[str]:
    """The entries of a file of that layout which, joined on the first axis, are the official parameter."""
    if layout == STABILITY:
        return stability_names(name, is_open_clip)
    if layout == DIFFUSERS:
        folder, names = diffusers_names(name, config)
        return [f"{folder}/{part}" for part in names]
    return [name]


class Fitted(Renamed):
    """A file's arrays under the official names, as far as a model wants them; unknown ones under their own.

    Attributes:
        unused: the entries that are known to be of no use to the model, by what they are.
    """

    unused: dict[str, list[str]]


def fit(
    arrays: Arrays, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, use_averages: bool = False
) -> Fitted:
    """Find the parameters of a model.

    Args:
        shapes: of the model's parameters, by official names.
        use_averages: take the moving average of a parameter where there is one.

    Raises:
        ValueError: there are no averages.
    """
    layout = layout_of(arrays)
    own = {common_spelling(name): name for name in arrays}
    is_open_clip = f"{CLIP}embeddings.token_embedding.weight" not in own
    made, left, averaged = {}, set(arrays), set()
    for name, shape in shapes.items():
        parts = names_in(layout, name, config, is_open_clip)
        if layout == MINDSPORE and name not in own and _other_spelling(name) in own:
            parts = [_other_spelling(name)]
        averages = [averaged_name(part) if layout == STABILITY else f"ema.{part}" for part in parts]
        if use_averages and all(part in own for part in averages):
            averaged.update(own[part] for part in parts if part in own)
            parts = averages
        if all(part in own for part in parts):
            found = [own[part] for part in parts]
            made[name] = Made(found, _shape_as_wanted(joined_shape(arrays, found), shape))
            left -= set(found)
    if use_averages and not averaged:
        raise ValueError("has no averaged weights beside the others: leave --use_ema_weights out")
    unused: dict[str, list[str]] = {}
    kinds = _unused_kinds(shapes, averaged)
    for entry in sorted(left):
        spelled = common_spelling(entry)
        if kind := next((kind for kind, is_one in kinds.items() if is_one(spelled)), None):
            unused.setdefault(kind, []).append(entry)
        elif entry not in made:
            made[entry] = Made([entry], arrays.shape(entry))
    result = Fitted(arrays, made)
    result.unused = unused
    return result


def _other_spelling(name: str) -> str:
    """A norm's parameter as mindone's converter of July 2023 named it."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def joined_shape(arrays: Arrays, names: list[str]) -> tuple[int, ...]:
    first, *rest = arrays.shape(names[0]), *names[1:]
    if not first or not all(map(arrays.shape, rest)):  # a number, which nothing is joined to
        return ()
    return (first[0] + sum(arrays.shape(name)[0] for name in rest), *first[1:]) if rest else first


def _shape_as_wanted(found: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer's weight and that of a 1x1 convolution are the same values."""
    same = found[:2] == wanted[:2] and {*found[2:], *wanted[2:]} <= {1}
    return tuple(wanted) if same and min(len(found), len(wanted)) == 2 else found


def _last(pattern: re.Pattern, needed: Iterable[str]) -> int:
    return max((int(match[1]) for match in map(pattern.match, needed) if match), default=-1)


def _unused_kinds(needed: Iterable[str], averaged: set[str]) -> dict[str, Callable[[str], bool]]:
    """What an entry is -> whether a name is of it, for the model with these parameters."""
    layer, level = _last(TEXT_LAYER, needed) + 1, _last(VAE_LEVEL, needed)
    # Stable Diffusion 2 reads the last but one layer of its text encoder: the file may have one more, a
    # second one would be another model.
    behind = (f"{TEXT_LAYERS}{layer}.", f"{OPEN_CLIP}transformer.resblocks.{layer}.",
              f"{CLIP}encoder.layers.{layer}.",
              f"text_encoder/text_model.encoder.layers.{layer}.")  # fmt: skip
    resampling = tuple(
        f"first_stage_model.{part}.conv.{kind}"
        for part in (f"encoder.down.{level}.downsample", "decoder.up.0.upsample")
        for kind in ("weight", "bias")
    )
    return {
        f"of the text encoder's layer {layer + 1}, which is never read": lambda name: (
            layer and name.startswith(behind)
        ),
        "convolutions of the VAE that early versions had and never used": lambda name: name in resampling,
        "weights whose averages were taken instead (--use_ema_weights)": lambda name: name in averaged,
        "averaged weights (take them with --use_ema_weights)": lambda name: name.startswith("model_ema."),
        "of a training's optimizer, averages and counters": lambda name: (
            name.startswith(STEP_PREFIXES) or name in STEP_SCALARS
        ),
        "of the noise schedule": lambda name: name in SCHEDULE,
        "of the text encoder, never read": lambda name: (
            name in TEXT_EXTRAS or name.endswith("embeddings.position_ids")
        ),
        "of the VAE's training": lambda name: name.startswith(("loss.", "first_stage_model.loss.")),
        "of a safety checker": lambda name: name.startswith("safety_checker"),
        "of other programs, never read": lambda name: (
            name.startswith(("embedding_manager.", "denoiser.", "lora_te_")) or name == "embedding_manager"
        ),
    }


def as_named_in(layout: str, arrays: Arrays, config: ModelConfig) -> Renamed:
    """Official parameters under the names, and in the shapes, of another layout: views, nothing is read."""
    is_open_clip = config.text_encoder.activation != "quick_gelu"
    made = {}
    for name in arrays:
        parts = names_in(layout, name, config, is_open_clip)
        shape = arrays.shape(name)
        if layout == DIFFUSERS and ".mid.attn_1." in name:
            shape = shape[:2]  # a linear layer there
        for index, part in enumerate(parts):
            made[part] = Made([name], (shape[0] // len(parts), *shape[1:]), index, len(parts))
    return Renamed(arrays, made)
