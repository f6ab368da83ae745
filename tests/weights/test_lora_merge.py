"""LoRA files merged into weights, and made of two models."""

import json
import logging

import convert_lora
import extract_lora
import merge_lora
import numpy as np
import pytest
from conftest import SHALLOW, V1, random_model, weights_as_arrays
from loras import random_pairs, units_in, written
from omegaconf import OmegaConf

from ldm.fields import LORA_TARGETS
from ldm.networks.latent_diffusion import build_model
from ldm.weights.arrays import ArraysInMemory
from ldm.weights.checkpoint import load_checkpoint
from ldm.weights.lora_files import Lora, read_lora
from ldm.weights.lora_merge import (
    OWN_METADATA,
    fingerprint_of,
    read_loras,
    require_same_version,
    split_weight,
)
from ldm.weights.writing import save_weights

CONFIGS = {"sd2": SHALLOW, "sd1": V1}


@pytest.fixture(scope="module", params=CONFIGS)
def given(request, tmp_path_factory):
    """A base model in a file, its configuration, weights and units, and two LoRA files."""
    import dataclasses

    config, place = CONFIGS[request.param], tmp_path_factory.mktemp("lora")
    weights, units = weights_as_arrays(random_model(config)), units_in(config)
    save_weights(weights, place / "base.ckpt")
    OmegaConf.save(dataclasses.asdict(config), place / "model.yaml")
    many, few = random_pairs(units, targets=LORA_TARGETS), random_pairs(units, rank=5, alpha=5.0, seed=1)
    written(place / "many.safetensors", units, many)
    written(place / "few.safetensors", units, few, "diffusers")
    return place, config, weights, units, (many, few)


def shapes_of(weights):
    return {name: values.shape for name, values in weights.items()}


def expected(weights, units, added):
    """W + weight * alpha / rank * B A in float64, of each weight."""
    result = {name: values.astype(np.float64) for name, values in weights.items()}
    for pairs, weight in added:
        for name, pair in pairs.items():
            delta = weight * pair.alpha / pair.rank * (pair.up.astype(np.float64) @ pair.down)
            target, part = result[units[name].weight], units[name].part
            rows = slice(None) if part is None else slice(part * len(delta), (part + 1) * len(delta))
            target[rows] += delta.reshape(target[rows].shape)
    return result


def loaded(config, base, added=()):
    model = build_model(config)
    load_checkpoint(model, base, added=added)
    return weights_as_arrays(model)


def test_several_files_are_added_with_their_weights(given, caplog):
    place, config, weights, units, (many, few) = given
    names = [f"{place / 'many.safetensors'}:0.7", f"{place / 'few.safetensors'}:-0.25"]
    with caplog.at_level(logging.INFO):
        ours = loaded(config, place / "base.ckpt", read_loras(names, shapes_of(weights), config))
    wanted = expected(weights, units, [(many, 0.7), (few, -0.25)])
    error = max(np.abs(ours[name] - wanted[name]).max() for name in wanted)
    moved = sum(not np.array_equal(ours[name], values) for name, values in weights.items())
    print(f"max |a - b| {error:.1e}, {moved} weights moved")
    assert error < 1e-6 and moved == len({units[name].weight for name in many})  # float32 sums of size 1
    assert f"{len(many)} additions of rank 3, added with weight 0.7" in caplog.text
    with pytest.raises(ValueError, match="has rank 3, lora_rank is 8"):
        read_loras(names, shapes_of(weights), config, rank=8)


def test_a_weight_behind_a_name():
    assert split_weight("a/b.safetensors:0.7")[1] == 0.7 and str(split_weight("a:b")[0]) == "a:b"
    assert split_weight("a/b.safetensors")[1] == 1 and split_weight("x:nan")[1] == 1


@pytest.mark.parametrize("target", ["whole.ckpt", "whole.safetensors", "folder"])
def test_a_merged_model_is_base_and_file(given, tmp_path, target):
    place, config, weights, *_ = given
    name = f"{place / 'many.safetensors'}:0.5"
    arguments = [str(place / "base.ckpt"), name, str(place / "few.safetensors"), str(tmp_path / target)]
    merge_lora.main([*arguments, f"--config={place / 'model.yaml'}"])
    added = read_loras([name, str(place / "few.safetensors")], shapes_of(weights), config)
    ours = loaded(config, place / "base.ckpt", added)
    merged = loaded(config, tmp_path / target)
    assert all(np.array_equal(merged[name], values) for name, values in ours.items())
    with pytest.raises(SystemExit):
        merge_lora.main([*arguments, f"--config={place / 'model.yaml'}"])


def test_a_difference_of_low_rank_is_found_again(given, tmp_path, capsys):
    """Exactly where its rank is no larger than the LoRA's; else with the error that is said."""
    place, config, weights, units, (many, _) = given
    tuned = {
        name: values.astype(np.float32) for name, values in expected(weights, units, [(many, 1.0)]).items()
    }
    norm = next(name for name in tuned if name.endswith(".gamma"))
    tuned[norm] = tuned[norm] + np.float32(0.01)
    save_weights(tuned, tmp_path / "tuned.safetensors")
    models = [str(place / "base.ckpt"), str(tmp_path / "tuned.safetensors")]
    config_flag = f"--config={place / 'model.yaml'}"
    exact = tmp_path / "exact.safetensors"
    extract_lora.main([*models, str(exact), config_flag, "--rank=3", "--dtype=float32",
                       f"--targets={'+'.join(LORA_TARGETS)}"])  # fmt: skip
    lora = read_lora(exact, units)
    assert lora.pairs.keys() == many.keys()
    for name, pair in lora.pairs.items():
        np.testing.assert_allclose(pair.delta(), many[name].delta(), atol=2e-5)
    assert json.loads(lora.metadata[OWN_METADATA])["base"] == fingerprint_of(weights)
    assert "they leave 0.0% of the difference of these weights" in capsys.readouterr().out
    rough = tmp_path / "rough.safetensors"
    extract_lora.main([*models, str(rough), config_flag, "--rank=1", "--targets=attention"])
    said = capsys.readouterr().out
    pairs = read_lora(rough, units).pairs
    assert {pair.rank for pair in pairs.values()} == {1} and len(pairs) < len(many)
    squares = [[np.square(many[n].delta()).sum(), np.square(many[n].delta() - p.delta()).sum()]
               for n, p in pairs.items()]  # fmt: skip
    whole, left = np.sum(squares, axis=0)
    assert f"they leave {np.sqrt(left / whole):.1%} of the difference" in said
    for bad in ([*models, str(rough), config_flag], [*models, "x.ckpt"], [models[0], *models]):
        with pytest.raises(SystemExit):
            extract_lora.main(bad)


def test_a_lora_is_written_anew(given, tmp_path):
    """Ranks, scales and what was noted stay; in diffusers' form the scale is in B."""
    place, config, weights, units, (many, _) = given
    texts = {OWN_METADATA: json.dumps({"base": "known"}), "ss_seed": "7"}
    path = written(tmp_path / "many.safetensors", units, many, metadata=texts)
    for naming, alpha in (("kohya", 2.0), ("diffusers", 3.0)):
        target = tmp_path / f"{naming}.safetensors"
        convert_lora.main([str(path), str(target), f"--config={place / 'model.yaml'}", "--dtype=float32",
                           f"--lora_format={naming}"])  # fmt: skip
        lora = read_lora(target, units)
        assert lora.pairs.keys() == many.keys() and {p.alpha for p in lora.pairs.values()} == {alpha}
        for name, pair in lora.pairs.items():
            np.testing.assert_allclose(pair.delta(), many[name].delta(), atol=1e-6)
        assert lora.metadata["ss_seed"] == "7"
        assert json.loads(lora.metadata[OWN_METADATA])["base"] == "known"
    with pytest.raises(SystemExit):
        convert_lora.main([str(path), str(target), f"--config={place / 'model.yaml'}"])
    with pytest.raises(SystemExit):  # it fits no version of Stable Diffusion
        convert_lora.main([str(path), str(tmp_path / "x.safetensors"), "-v2.0"])


def test_what_it_was_trained_on_is_compared(given, caplog):
    place, config, weights, units, _ = given
    pairs = random_pairs(units)
    base = fingerprint_of(weights)
    halves = {name: values.astype(np.float16) for name, values in weights.items()}
    assert fingerprint_of(ArraysInMemory(halves)) == base
    for metadata, words in (
        ({OWN_METADATA: json.dumps({"prediction_type": "v_prediction"})}, "predicts v_prediction"),
        ({"modelspec.prediction_type": "v"}, "give the base model that belongs to it"),
        ({"ss_base_model_version": "sd_v2_v"}, "this base model predicts epsilon"),
    ):
        with pytest.raises(ValueError, match=words):
            require_same_version(Lora(place / "x", pairs, metadata), config)
    for metadata in ({}, {"ss_base_model_version": "sd_v2"}, {OWN_METADATA: "[not JSON"}):
        require_same_version(Lora(place / "x", pairs, metadata), config)
    for noted, is_said in ((base, False), ("0" * 64, True)):
        texts = {OWN_METADATA: json.dumps({"base": noted, "prediction_type": "epsilon"})}
        path = written(place / f"{is_said}.safetensors", units, pairs, metadata=texts)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            loaded(config, place / "base.ckpt", read_loras([str(path)], shapes_of(weights), config))
        assert ("was trained on another base model of the same version" in caplog.text) == is_said
