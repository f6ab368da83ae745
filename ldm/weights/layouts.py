"""Which entries of a weight file a model takes: what files of 2023 hold beside its parameters, and what a
file is that does not fit.

Knows names and shapes only. Loading stays strict: an entry that is neither needed nor listed here is unknown,
and refuses the file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

TEXT_LAYERS = "cond_stage_model.transformer.transformer_layer.resblocks."
TEXT_LAYER = re.compile(re.escape(TEXT_LAYERS) + r"(\d+)\.")
VAE_LEVEL = re.compile(r"first_stage_model\.encoder\.down\.(\d+)\.")
# mindone's and MindSpore's training steps, saved whole: optimizer moments, averages, accumulated gradients;
# counters and scalars.
STEP_PREFIXES = ("adam_m.", "adam_v.", "moment1.", "moment2.", "ema.", "swap.", "grad_accumulated_", "zeros_")
STEP_SCALARS = {
    "learning_rate", "beta1_power", "beta2_power", "global_step", "scale_sense", "current_iterator_step",
    "last_overflow_iterator_step", "epoch_num", "cur_step", "loss_scale", "updates",
}  # fmt: skip
# of norms, in files that mindone's converter of July 2023 wrote
OTHER_SPELLING = {
    ".gamma": ".weight",
    ".beta": ".bias",
}
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.conv.weight"
POSITIONS = "cond_stage_model.transformer.positional_embedding"
BY_INPUT_CHANNELS = {5: "a depth-to-image model", 8: "an instruct-pix2pix model", 9: "an inpainting model"}


class Selected(Mapping):
    """A weight file's arrays under the names that a model wants, as far as it has them.

    Attributes:
        unused: the entries that are known to be of no use to the model, by what they are.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], needed: Iterable[str]) -> None:
        self._weights, needed = weights, set(needed)
        self._names = {_spelled(name, weights, needed): name for name in weights}
        unused = _unused_kinds(needed)
        self.unused: dict[str, list[str]] = {}
        for name in self._names.keys() - needed:
            if kind := next((kind for kind, is_one in unused.items() if is_one(name)), None):
                self.unused.setdefault(kind, []).append(self._names.pop(name))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _spelled(name: str, weights: Mapping, needed: set[str]) -> str:
    """A norm's `weight` and `bias` as `gamma` and `beta`, where the model wants these and the file has not
    got both.
    """
    for ours, theirs in OTHER_SPELLING.items():
        other = name.removesuffix(theirs) + ours
        if name.endswith(theirs) and name not in needed and other in needed and other not in weights:
            return other
    return name


def _last(pattern: re.Pattern, needed: set[str]) -> int:
    return max((int(match[1]) for match in map(pattern.match, needed) if match), default=-1)


def _unused_kinds(needed: set[str]) -> dict:
    """What an entry is -> whether a name is of it, for the model with these parameters."""
    layer, level = _last(TEXT_LAYER, needed) + 1, _last(VAE_LEVEL, needed)
    # Stable Diffusion 2 reads the last but one layer of its text encoder: the file may have one more, a
    # second one would be another model.
    behind = f"{TEXT_LAYERS}{layer}."
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
        "of a training's optimizer, averages and counters": lambda name: (
            name.startswith(STEP_PREFIXES) or name in STEP_SCALARS
        ),
    }


def what_it_is(weights: Mapping[str, np.ndarray], needed: Iterable[str]) -> str | None:
    """What a file is that does not fit the model with these parameters, and what to do; None where
    nothing is known of it.
    """
    shapes = {name: weights[name].shape for name in (FIRST_CONV, POSITIONS) if name in weights}
    if any(
        "lora_down" in name or "lora_up" in name or ".lora_A." in name or name.startswith("lora_")
        for name in weights
    ):
        return (
            "these are LoRA weights, a small addition to a base model, which this version cannot read "
            "yet; give a whole checkpoint"
        )
    if any(".label_emb." in name for name in weights):
        return "this is an unCLIP model, which generates from images; give a text-to-image model"
    if len(shapes.get(FIRST_CONV, ())) == 4 and (kind := BY_INPUT_CHANNELS.get(shapes[FIRST_CONV][1])):
        return f"this is {kind}; give a text-to-image model"
    if shapes.get(POSITIONS, ())[-1:] == (768,):
        return (
            "this is Stable Diffusion 1 (1.4, 1.5, or the Chinese wukong-huahua): its text encoder is 768 "
            "wide; "
            "this version reads Stable Diffusion 2 only"
        )
    if (
        any(name.startswith(("adam_m.", "moment1.")) for name in weights)
        and not set(needed) <= weights.keys()
    ):
        return (
            "this is the saved state of a training, not a whole model: continue that training with --resume, "
            "or give one of its checkpoints (dreambooth_epoch_*.ckpt)"
        )
    return None
