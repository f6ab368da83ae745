"""Files of LoRA, whoever wrote them: names, scales, shapes; what is refused."""

import hashlib
import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import ROOT, SHALLOW, V1, official_table, random_model, torch_networks, weights_as_arrays
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from loras import (
    adapter_metadata,
    processor_name,
    random_pairs,
    spelled,
    units_in,
    without_text_model,
    written,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from ldm.config import read_model_config
from ldm.fields import LORA_TARGETS
from ldm.weights.lora_files import Pair, read_lora
from ldm.weights.lora_units import spellings, units_of
from ldm.weights.mindspore_ckpt import write_ckpt

UNITS = units_in(SHALLOW)
PAIRS = random_pairs(UNITS)


def assert_same(lora, pairs, alpha=None, dtype=np.float32):
    assert lora.pairs.keys() == pairs.keys()
    for name, pair in pairs.items():
        found = lora.pairs[name]
        assert np.array_equal(found.down, pair.down.astype(dtype).astype(np.float32)), name
        assert np.array_equal(found.up, pair.up.astype(dtype).astype(np.float32)), name
        assert found.alpha == (pair.alpha if alpha is None else alpha) and found.down.dtype == np.float32


@pytest.mark.parametrize("version, yaml, texts", [("v1", "sd_v1", (48, 24)), ("v2_base", "sd_v2", (92, 46))])
def test_the_published_models_have_the_modules_that_others_count(version, yaml, texts):
    """kohya: 192 in the UNet without convolutions, 72 or 138 in the text encoder; diffusers: 128."""
    config = read_model_config(ROOT / f"configs/train_dreambooth_{yaml}.yaml")
    units = units_of({name: shape for name, (shape, _) in official_table(version).items()}, config)
    counts = {
        target: [
            sum(unit.target == target and unit.is_of_text == is_text for unit in units.values())
            for is_text in (False, True)
        ]
        for target in LORA_TARGETS[:3]
    }
    assert counts == {
        "attention": [128, texts[0]], "feed_forward": [32, texts[1]], "projections": [32, 0]
    }  # fmt: skip
    assert all(len(found) in (1, 3) for found in spellings(units).values())
    known = {unit.kohya for unit in units.values()}
    assert {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_3_attentions_2_proj_out",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj",
        "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_0_mlp_fc2",
    } <= known
    assert {  # by A1111's rules
        "lora_unet_output_blocks_2_1_conv", "lora_unet_output_blocks_5_2_conv",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_4_0_skip_connection", "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
    } <= spellings(units).keys()  # fmt: skip


def kohya_modules(network, classes, prefix) -> set[str]:
    """What kohya's create_modules finds: linear layers and convolutions in modules of these classes."""
    found = set()
    for name, module in network.named_modules():
        if type(module).__name__ in classes:
            for child, layer in module.named_modules():
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                    found.add(f"{prefix}_{name}.{child}".replace(".", "_"))
    return found


@pytest.mark.parametrize("config", [SHALLOW, V1], ids=["sd2", "sd1"])
def test_every_target_has_the_names_that_kohya_gives(config):
    unet, _, text = torch_networks(weights_as_arrays(random_model(config)), config)
    units = units_in(config).values()
    ours = {unit.kohya for unit in units if unit.target in LORA_TARGETS[:3] and not unit.is_of_text}
    assert ours == kohya_modules(unet, {Transformer2DModel.__name__}, "lora_unet")
    more = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
    ours = {unit.kohya for unit in units if unit.target == "convolutions"}
    assert ours == kohya_modules(unet, more, "lora_unet")
    ours = {without_text_model(unit.kohya) for unit in units if unit.is_of_text}
    theirs = kohya_modules(text, {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}, "lora_te")
    assert ours == {without_text_model(name) for name in theirs}


@pytest.mark.parametrize("targets", [LORA_TARGETS[:1], LORA_TARGETS], ids=["attention", "all"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_written_is_read(tmp_path, targets, dtype):
    pairs = random_pairs(UNITS, targets=targets)
    path = written(tmp_path / "a.safetensors", UNITS, pairs, "kohya", dtype, {"ss_network_dim": "3"})
    lora = read_lora(path, UNITS)
    assert_same(lora, pairs, dtype=dtype)
    assert lora.ranks() == "3" and lora.metadata["ss_output_name"] == "a"
    # without alpha in the file: it is in B
    path = written(tmp_path / "b.safetensors", UNITS, pairs, "diffusers", dtype)
    for name, found in read_lora(path, UNITS).pairs.items():
        assert found.alpha == 3
        np.testing.assert_allclose(
            found.delta(), pairs[name].delta(), atol=1e-6 if dtype == np.float32 else 4e-3
        )


def test_a_written_file_is_as_the_library_writes_it_and_known_by_its_hashes(tmp_path):
    path = written(
        tmp_path / "a.safetensors", UNITS, PAIRS, metadata={"ss_v2": "True", "modelspec.date": "x"}
    )
    content, arrays = path.read_bytes(), load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    behind = 8 + int.from_bytes(content[:8], "little")
    assert hashlib.sha256(content[behind:]).hexdigest() == metadata["sshs_model_hash"]
    only_kohyas = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    theirs = save(arrays, only_kohyas)
    assert theirs[8 + int.from_bytes(theirs[:8], "little") :] == content[behind:]
    assert (
        hashlib.sha256(theirs[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8]
        == metadata["sshs_legacy_hash"]
    )
    assert all(values.shape == () for name, values in arrays.items() if name.endswith(".alpha"))


def stability(unit):
    """Of the UNet, in the names of Stability's blocks, with underscores."""
    from ldm.weights.stability_names import stability_names

    (name,) = stability_names(unit.weight, True)
    return "lora_unet_" + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(
        ".", "_"
    )


SPELLINGS = {  # (name, down, up, alpha, metadata), and the alpha that is read
    "kohya": ((lambda u: u.kohya, ".lora_down.weight", ".lora_up.weight", ".alpha"), 2.0),
    "kohya without alpha": ((lambda u: u.kohya, ".lora_down.weight", ".lora_up.weight"), 3.0),
    "kohya, without text_model": (
        (lambda u: without_text_model(u.kohya), ".lora_down.weight", ".lora_up.weight", ".alpha"), 2.0
    ),
    "PEFT's names": ((lambda u: u.diffusers, ".lora_A.weight", ".lora_B.weight"), 3.0),
    "with the adapter's name": (
        (lambda u: u.diffusers, ".lora_A.default.weight", ".lora_B.default.weight"), 3.0
    ),
    "without text_model, with metadata": (
        (lambda u: without_text_model(u.diffusers), ".lora_A.weight", ".lora_B.weight", None,
         adapter_metadata(3, 2)), 2.0
    ),
    "diffusers, UNet's ending": ((lambda u: u.diffusers, ".lora.down.weight", ".lora.up.weight"), 3.0),
    "diffusers, text's ending": (
        (lambda u: u.diffusers, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), 3.0
    ),
    "attention processors": ((processor_name, "_lora.down.weight", "_lora.up.weight"), 3.0),
    "ComfyUI, official": ((lambda u: u.name, ".lora_down.weight", ".lora_up.weight", ".alpha"), 2.0),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("four", [False, True], ids=["matrices", "as_convolutions"])
def test_every_spelling(tmp_path, case, four):
    arguments, alpha = SPELLINGS[case]
    path = spelled(tmp_path / "a.safetensors", UNITS, PAIRS, arguments, four=four)
    assert_same(read_lora(path, UNITS), PAIRS, alpha)


def of_unet(pairs):
    return {name: pair for name, pair in pairs.items() if not UNITS[name].is_of_text}


def test_spellings_of_the_unet_alone(tmp_path):
    """The oldest processors have no prefix; kohya's names also come with Stability's blocks."""
    pairs = of_unet(PAIRS)
    oldest = spelled(
        tmp_path / "a.safetensors", UNITS, pairs,
        (lambda u: processor_name(u).removeprefix("unet."), "_lora.down.weight", "_lora.up.weight"),
    )  # fmt: skip
    assert_same(read_lora(oldest, UNITS), pairs, 3.0)
    pairs = of_unet(random_pairs(UNITS, targets=LORA_TARGETS))
    arguments = stability, ".lora_down.weight", ".lora_up.weight", ".alpha"
    assert_same(read_lora(spelled(tmp_path / "b.safetensors", UNITS, pairs, arguments), UNITS), pairs)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves(tmp_path, dtype):
    path = spelled(tmp_path / "a.safetensors", UNITS, PAIRS, SPELLINGS["kohya"][0])
    arrays = {name: values.astype(dtype) for name, values in load_file(path).items()}
    save_file(arrays, path)
    assert_same(read_lora(path, UNITS), PAIRS, dtype=dtype)


def test_folders_of_peft(tmp_path):
    """UNet alone; alpha from adapter_config.json, by patterns, and over the root of the rank (rsLoRA)."""
    pairs = of_unet(PAIRS)
    first = next(iter(pairs))
    module = UNITS[first].diffusers.removeprefix("unet.")

    def name(unit):
        return "base_model.model." + unit.diffusers.removeprefix("unet.")

    spelling = name, ".lora_A.weight", ".lora_B.weight"
    spelled(tmp_path / "adapter_model.safetensors", UNITS, pairs, spelling)
    config = {"r": 3, "lora_alpha": 6, "alpha_pattern": {module: 9}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = read_lora(path, UNITS).pairs
        assert {pair.alpha for name, pair in found.items() if name != first} == {6.0}
        assert found[first].alpha == 9 and np.array_equal(found[first].up, pairs[first].up)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert np.isclose(read_lora(tmp_path, UNITS).pairs[first].alpha, 9 * np.sqrt(3))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="this is DoRA"):
        read_lora(tmp_path, UNITS)
    with pytest.raises(FileNotFoundError, match="a folder without adapter_model.safetensors"):
        read_lora(tmp_path.parent, UNITS)


def mindone(path, rank=3):
    """A checkpoint of the 2023 example: one pair for the joined projection, the rank beside it."""
    rng, arrays, pairs = np.random.default_rng(1), {}, {}
    for name, unit in UNITS.items():
        if unit.target != "attention":
            continue
        module, thirds = (name, 1) if unit.part is None else (name[:-2], 3)
        if f"{module}.lora_down.weight" not in arrays:
            out, size = unit.shape[0] * thirds, unit.shape[1]
            arrays[f"{module}.lora_down.weight"] = rng.standard_normal((rank, size)).astype(np.float32)
            arrays[f"{module}.lora_up.weight"] = rng.standard_normal((out, rank)).astype(np.float32)
        up = arrays[f"{module}.lora_up.weight"]
        part = up if thirds == 1 else up[unit.part * unit.shape[0] : (unit.part + 1) * unit.shape[0]]
        pairs[name] = Pair(arrays[f"{module}.lora_down.weight"], part, float(rank))
    arrays["lora_rank"] = np.array(rank, np.int64)
    with open(path, "wb") as file:
        write_ckpt(file, arrays.items())
    return pairs


def test_a_checkpoint_of_2023(tmp_path):
    pairs = mindone(tmp_path / "a.ckpt")
    assert any(name.endswith(".in_proj.k") for name in pairs)
    assert_same(read_lora(tmp_path / "a.ckpt", UNITS), pairs)


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SDXL = "lora_unet_output_blocks_0_1_transformer_blocks_9_attn1_to_q.lora_down.weight"
REFUSED = {  # changes of the arrays, and what is said
    "an unknown entry": ({"lora_unet_head.lora_down.weight": np.ones((3, 2), np.float32)},
                         "not understood or not of this model: 1 (lora_unet_head.lora_down.weight)"),
    "LoHa": ({f"{KEY}.hada_w1_a": np.ones((3, 3), np.float32)}, "this is LoHa, which is not read"),
    "differences": ({f"{KEY}.diff": np.ones((3, 3), np.float32)}, "this is full differences"),
    "DoRA": ({f"{KEY}.dora_scale": np.ones((1, 3), np.float32)}, "this is DoRA, which is not read"),
    "SDXL": ({SDXL: np.ones((4, 8), np.float32), "lora_te2_x.alpha": np.ones((), np.float32)},
             "LoRA for Stable Diffusion XL"),
    "half an addition": ({f"{KEY}.lora_up.weight": None}, f"other half: 2 ({KEY}.alpha, {KEY}.lora_down"),
    "another width": ({f"{KEY}.lora_down.weight": np.ones((3, 99), np.float32)},
                      "is it for another version of Stable Diffusion?"),
    "another rank": ({f"{KEY}.lora_down.weight": np.ones((4, 64), np.float32)}, "do not fit"),
    "rank 0": ({f"{KEY}.lora_down.weight": np.ones((0, 64), np.float32)}, "do not fit"),
    "NaN": ({f"{KEY}.lora_up.weight": np.full((64, 3), np.nan, np.float32)}, f"{KEY}.lora_up.weight has NaN"),
    "alpha NaN": ({f"{KEY}.alpha": np.array(np.inf, np.float32)}, f"{KEY}.alpha has NaN or Inf"),
    "whole numbers": ({f"{KEY}.lora_up.weight": np.ones((64, 3), np.int32)}, "must hold floats, got int32"),
    "alpha of two": ({f"{KEY}.alpha": np.ones(2, np.float32)}, "must be one number"),
    "twice": ({f"unet.{UNITS[next(iter(PAIRS))].diffusers[5:]}.lora_A.weight": np.ones((3, 32), np.float32)},
              "are the same addition"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    changes, words = REFUSED[case]
    arrays = load_file(spelled(tmp_path / "a.safetensors", UNITS, PAIRS, SPELLINGS["kohya"][0]))
    assert f"{KEY}.lora_up.weight" in arrays
    arrays = {name: values for name, values in (arrays | changes).items() if values is not None}
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_lora(tmp_path / "a.safetensors", UNITS)
    assert "\n" not in str(caught.value)


def test_what_is_no_lora_at_all(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a LoRA: a whole model goes with --ckpt_path"):
        read_lora(tmp_path / "a.safetensors", UNITS)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_lora(tmp_path / "b.safetensors", UNITS)
    path = spelled(tmp_path / "c.safetensors", UNITS, PAIRS, SPELLINGS["kohya"][0])
    with pytest.raises(ValueError, match="is it for another version"):
        read_lora(path, units_in(read_model_config(ROOT / "configs/train_dreambooth_tiny.yaml")))
    mindone(tmp_path / "d.ckpt")
    (tmp_path / "checkpoints.sha256").write_text(f"{'0' * 64}  d.ckpt\n")
    with pytest.raises(ValueError, match="not what was written"):
        read_lora(tmp_path / "d.ckpt", UNITS)
