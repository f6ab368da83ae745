"""Files of 2023: what they hold beside the model's parameters is left out, what is something else says what
it is.
"""

import hashlib
import logging

import mindspore as ms
import numpy as np
import pytest
from conftest import DEEP, SHALLOW, official_table, random_model, read_checkpoint, weights_as_arrays

from ldm.config import read_model_config
from ldm.networks.latent_diffusion import build_model
from ldm.weights.arrays import ArraysInMemory
from ldm.weights.checkpoint import load_weights, weights_of
from ldm.weights.layouts import fit
from ldm.weights.writing import save_weights

BLOCK = "cond_stage_model.transformer.transformer_layer.resblocks."
RESAMPLING = ("encoder.down.{last}.downsample", "decoder.up.0.upsample")
# As mindone's code of June to September 2023 adds them, and MindSpore's own training steps.
PREFIXES = ("adam_m.", "adam_v.", "moment1.", "moment2.", "ema.", "swap.", "grad_accumulated_", "zeros_")
SCALARS = {
    "learning_rate": 1e-5,
    "beta1_power": 0.5,
    "beta2_power": 0.5,
    "global_step": 7,
    "scale_sense": 512.0,
    "updates": 7,
}
APPENDED = {
    "epoch_num": 3,
    "cur_step": 600,
    "loss_scale": 65536.0,
    "current_iterator_step": 0,
    "last_overflow_iterator_step": 0,
}


def text_layer(weights: dict, number: int) -> dict:
    """One more layer of the text encoder, as the first."""
    return {
        name.replace(f"{BLOCK}0.", f"{BLOCK}{number}."): value
        for name, value in weights.items()
        if name.startswith(f"{BLOCK}0.")
    }


def resampling(config) -> dict:
    last = len(config.autoencoder.channel_mult) - 1
    names = [
        f"first_stage_model.{part.format(last=last)}.conv.{kind}"
        for part in RESAMPLING
        for kind in ("weight", "bias")
    ]
    return {name: np.ones((2, 2, 3, 3) if name.endswith("weight") else 2, np.float32) for name in names}


def norms_of_the_vae(weights: dict) -> dict:
    """As mindone's converter wrote them in July 2023."""
    spelled = {".gamma": ".weight", ".beta": ".bias"}

    def name_there(name):
        ending = next((ending for ending in spelled if name.endswith(ending)), None)
        return (
            name.removesuffix(ending) + spelled[ending]
            if ending and name.startswith("first_stage_model.")
            else name
        )

    return {name_there(name): value for name, value in weights.items()}


def whole_step(weights: dict) -> dict:
    trained = [name for name in weights if not name.startswith("first_stage_model.")]
    copies = {prefix + name: np.zeros_like(weights[name]) for prefix in PREFIXES for name in trained}
    return weights | copies | {name: np.asarray(value) for name, value in SCALARS.items()}


LAYER, VAE, STEP = "of the text encoder's layer", "convolutions of the VAE", "of a training's optimizer"
KINDS = {
    "1,226 entries": (
        lambda weights, config: weights | text_layer(weights, config.text_encoder.layers),
        [LAYER],
    ),
    "before July 2023": (lambda weights, config: weights | resampling(config), [VAE]),
    "norms weight and bias": (lambda weights, config: norms_of_the_vae(weights), []),
    "a whole training step": (lambda weights, config: whole_step(weights), [STEP]),
    "all of it": (
        lambda weights, config: whole_step(
            norms_of_the_vae(weights) | text_layer(weights, config.text_encoder.layers) | resampling(config)
        ),
        [LAYER, VAE, STEP],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_more_than_the_model_is_whole(tmp_path, config, kind, caplog):
    """Written by MindSpore itself, embeddings in float16; what is saved afterwards has the model's parameters
    alone.
    """
    change, left_out = KINDS[kind]
    weights = weights_as_arrays(random_model(config))
    for name in ("embedding_table", "positional_embedding"):
        weights[f"cond_stage_model.transformer.{name}"] = weights[
            f"cond_stage_model.transformer.{name}"
        ].astype(np.float16)
    given = change(weights, config)
    path = tmp_path / "sd.ckpt"
    appended = APPENDED if STEP in left_out else None
    ms.save_checkpoint(
        [{"name": name, "data": ms.Tensor(value)} for name, value in given.items()],
        str(path),
        append_dict=appended,
    )
    model = build_model(config)
    caplog.set_level(logging.INFO)
    load_weights(model, read_checkpoint(path), path.name)
    loaded = weights_as_arrays(model)
    assert loaded.keys() == weights.keys()
    assert all(np.array_equal(loaded[name], value.astype(np.float32)) for name, value in weights.items())
    lines = [line for line in caplog.messages if "left out" in line]
    assert len(lines) == bool(left_out) and all(part in line for line in lines for part in left_out)
    save_weights(weights_of(model), tmp_path / "again.ckpt")
    assert read_checkpoint(tmp_path / "again.ckpt").keys() == weights.keys()


def full_size() -> dict[str, np.ndarray]:
    """The 1,214 official names; arrays of their shapes that take no memory."""
    return {
        name: np.broadcast_to(np.float32(0.5), shape)
        for name, (shape, _) in official_table("v2_base").items()
    }


def test_the_1226_names_of_the_official_file():
    official = full_size()
    file = official | {
        name.replace("resblocks.0.", "resblocks.23."): value
        for name, value in official.items()
        if f"{BLOCK}0." in name
    }
    assert (len(official), len(file)) == (1214, 1226)
    shapes = {name: value.shape for name, value in official.items()}
    config = read_model_config("configs/train_dreambooth_sd_v2.yaml")
    selected = fit(ArraysInMemory(file), shapes, config)
    assert selected.keys() == official.keys()
    ((kind, names),) = selected.unused.items()
    assert "layer 24" in kind and len(names) == 12 and all(name.startswith(f"{BLOCK}23.") for name in names)


@pytest.mark.parametrize("add, wanted", [
    # SD2 reads the last but one of its layers
    (lambda weights: text_layer(weights, 2) | text_layer(weights, 3), "not of this model: 12"),
    (lambda weights: text_layer(weights, 3), "not of this model: 12"),
    ({"first_stage_model.encoder.down.0.extra.conv.weight": np.ones(2)}, "not of this model: 1"),
    ({"first_stage_model.encoder.norm_out.weight": np.ones(2)}, "not of this model: 1"),  # beside its gamma
    ({"global_step_": np.ones(2)}, "not of this model: 1"), ({"momentum.a": np.ones(2)},
    "not of this model: 1"),
])  # fmt: skip
def test_whatever_else_is_in_a_file_refuses_it(add, wanted):
    weights = weights_as_arrays(random_model(SHALLOW))
    with pytest.raises(ValueError, match=wanted):
        load_weights(build_model(SHALLOW), weights | (add(weights) if callable(add) else add), "file.ckpt")


def test_a_parameter_that_is_missing_is_not_found_under_a_training_steps_name():
    weights = weights_as_arrays(random_model(SHALLOW))
    name = "first_stage_model.encoder.norm_out.gamma"
    weights["ema." + name] = weights.pop(name)
    with pytest.raises(ValueError, match=rf"missing: 1 \({name}\)"):
        load_weights(build_model(SHALLOW), weights, "file.ckpt")


def test_the_averages_in_a_whole_training_step():
    """mindone's `ema.`, of what it trained; of the others the weights themselves."""
    weights = weights_as_arrays(random_model(SHALLOW))
    trained = {name for name in weights if name.startswith("model.")}
    step = weights | {f"ema.{name}": weights[name] + 1 for name in trained}
    for use_averages in (False, True):
        model = build_model(SHALLOW)
        load_weights(model, step, "train_resume.ckpt", use_averages)
        for name, values in weights_as_arrays(model).items():
            assert np.array_equal(values, weights[name] + (use_averages and name in trained)), name


def test_what_is_wrong_with_a_whole_training_step_is_said_not_what_it_is():
    weights = whole_step(weights_as_arrays(random_model(SHALLOW)))
    name = "first_stage_model.encoder.norm_out.gamma"
    with pytest.raises(ValueError, match=f"with NaN or Inf: 1 .{name}"):
        load_weights(
            build_model(SHALLOW), weights | {name: np.full_like(weights[name], np.nan)}, "train_resume.ckpt"
        )
    flat = {
        "model.diffusion_model.input_blocks.0.0.conv.weight": np.ones(3),
        "cond_stage_model.transformer.positional_embedding": np.ones(()),
    }
    with pytest.raises(ValueError, match="of another shape: 2"):
        load_weights(build_model(SHALLOW), weights | flat, "flat.ckpt")


FIRST = "model.diffusion_model.input_blocks.0.0.conv.weight"
FOREIGN = {
    "LoRA of mindone": ({FIRST.replace("0.0.conv", "1.1.attn1.to_q.lora_down"): np.ones((4, 320)),
                         "lora_rank": np.array(4)}, "these are LoRA weights"),
    "LoRA of kohya": ({"lora_unet_mid_block_attentions_0_proj_in.alpha": np.ones(1)},
    "these are LoRA weights"),
    "LoRA of PEFT": ({"base_model.model.mid_block.attentions.0.to_q.lora_A.weight": np.ones((4, 320))},
    "these are LoRA weights"),
    "state": ({"adam_m.model.diffusion_model.out.2.conv.bias": np.ones(4)},
    "the saved state of a training.*--resume"),
    "wukong-huahua": ({"cond_stage_model.transformer.embedding_table": np.ones((21128, 4))},
    "its text encoder knows 21128 tokens.*wukong"),
    "inpainting": ({FIRST: np.ones((320, 9, 3, 3))}, "an inpainting model"),
    "depth": ({FIRST: np.ones((320, 5, 3, 3))}, "a depth-to-image model"),
    "unCLIP": ({"model.diffusion_model.label_emb.0.0.weight": np.ones((4, 4))}, "an unCLIP model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_file_says_what_it_is(tmp_path, kind):
    entries, wanted = FOREIGN[kind]
    save_weights(entries, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=rf"file\.ckpt: this is {wanted}|file\.ckpt: {wanted}") as error:
        load_weights(build_model(DEEP), read_checkpoint(tmp_path / "file.ckpt"), str(tmp_path / "file.ckpt"))
    assert "\n" not in str(error.value) and "missing" not in str(error.value)


def test_a_published_files_name_is_compared_with_its_digest(tmp_path, caplog):
    weights = {"a": np.ones(3, np.float32)}
    save_weights(weights, tmp_path / "plain.ckpt")
    content = (tmp_path / "plain.ckpt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    names = {
        f"sd_v2_base-{digest[:8]}.ckpt": False,
        "sd_v2_base-57526ee4.ckpt": True,
        "my-model.ckpt": False,
        "dog-20230915.ckpt": False,
    }
    for name, warned in names.items():
        (tmp_path / name).write_bytes(content)
        caplog.clear()
        assert read_checkpoint(tmp_path / name).keys() == weights.keys()
        assert (f"its SHA-256 begins with {digest[:8]}, not with 57526ee4" in caplog.text) == warned, name
