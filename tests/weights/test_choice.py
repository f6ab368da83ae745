"""Which configuration belongs to weights: by their shapes, by a version, by what lies beside them."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import ROOT, SHALLOW, official_table, random_model, weights_as_arrays

from ldm.command_line import parse_options
from ldm.config import read_model_config
from ldm.options import TrainOptions
from ldm.sample_options import SampleOptions
from ldm.values import ConfigError
from ldm.versions import VERSIONS, configurations
from ldm.weights.arrays import ArraysInMemory
from ldm.weights.choice import choose_config
from ldm.weights.layouts import STABILITY, as_named_in
from ldm.weights.source import Source, open_weights
from ldm.weights.writing import save_weights


def full_size(version: str, **more) -> Source:
    """The names and shapes of an official file, under Stability's names, without memory for values."""
    table = official_table({"1": "v1", "2": "v2_base"}[version[0]])
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, (shape, _) in table.items()}
    config = read_model_config(VERSIONS[version].model_config)
    named = as_named_in(STABILITY, ArraysInMemory(arrays), config)
    shown = {name: np.broadcast_to(np.float32(0), named.shape(name)) for name in named}
    return Source(ROOT / "model.safetensors", [], ArraysInMemory(shown | more))


def test_every_version_has_its_configuration():
    sizes = {version: read_model_config(VERSIONS[version].model_config) for version in VERSIONS}
    predictions = {version: config.noise_schedule.prediction_type for version, config in sizes.items()}
    assert {version for version, kind in predictions.items() if kind == "v_prediction"} == {"2.0-v", "2.1-v"}
    assert {version: config.image_size for version, config in sizes.items()} == {
        "1.4": 512, "1.5": 512, "2.0": 512, "2.0-v": 768, "2.1": 512, "2.1-v": 768,
    }  # fmt: skip
    assert [v for v in VERSIONS if sizes[v].unet.upcast_attention] == ["2.0-v", "2.1", "2.1-v"]
    assert sizes["1.5"].unet.heads(1280) == 8 and sizes["2.1"].unet.heads(1280) == 20
    assert sizes["2.1-v"].precision == "auto" and len(configurations()) == 5


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_a_file_is_known_by_its_shapes(version):
    source = choose_config(full_size(version))
    known_by = source.known_by
    assert not source.is_stated and source.config == read_model_config(VERSIONS[version].model_config)
    assert f"by {VERSIONS[version].model_config}" in known_by
    assert "predicts the noise (epsilon), which no single file is bound to say" in known_by
    assert known_by.startswith("Stable Diffusion " + version[0])


def test_what_is_given_wins_and_must_fit():
    source = full_size("2.0")
    for version in ("2.0-v", "2.1", "2.1-v"):
        assert choose_config(source, version=version).config == read_model_config(
            VERSIONS[version].model_config
        )
    own = "configs/train_dreambooth_sd_v2_768_v.yaml"
    assert choose_config(source, own, version="1.5").config.image_size == 768  # the YAML before the version
    for given in ({"version": "1.5"}, {"given": "configs/train_dreambooth_sd_v1.yaml"},
                  {"given": "configs/train_dreambooth_tiny.yaml"}):  # fmt: skip
        with pytest.raises(ConfigError, match="does not match .*; configs/train_dreambooth_sd_v2.yaml fits"):
            choose_config(source, **given)


def test_the_mark_of_v_prediction():
    """And of a file that the spread of a norm, its metadata or its published name tells of."""
    norm = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    spread = np.tile(np.float32([-0.2, 0.2]), 160)
    for values, wanted in ((spread, "v_prediction"), (spread / 10, "epsilon")):
        source = choose_config(full_size("2.0", **{norm: values}))
        assert source.config.noise_schedule.prediction_type == wanted and "the spread 0." in source.known_by
    source = full_size("2.0", **{norm: spread})
    source.arrays.metadata = {"modelspec.prediction_type": "epsilon"}
    assert choose_config(source).config.noise_schedule.prediction_type == "epsilon"
    for version in ("2.0", "2.0-v", "2.1", "2.1-v"):
        named = dataclasses.replace(full_size("2.0"), path=ROOT / "models" / VERSIONS[version].file)
        assert choose_config(named).config == read_model_config(VERSIONS[version].model_config)
    with pytest.raises(ConfigError, match="predicts v .*, by the mark v_pred in it"):
        choose_config(full_size("1.5", v_pred=np.zeros(0, np.float32)))
    source = choose_config(full_size("2.0", v_pred=np.zeros(0, np.float32)))
    assert source.config.noise_schedule.prediction_type == "v_prediction" and "768_v.yaml" in source.known_by


def test_a_checkpoint_of_a_run_is_known_by_the_run(tmp_path):
    """Its configuration needs no YAML beside the program."""
    weights = weights_as_arrays(random_model(SHALLOW))
    save_weights(weights, tmp_path / "dreambooth_epoch_1.ckpt", record=True)
    with pytest.raises(ConfigError, match="no configuration in configs/ fits"):
        choose_config(open_weights(tmp_path / "dreambooth_epoch_1.ckpt"))
    predicts_v = dataclasses.replace(
        SHALLOW, noise_schedule=dataclasses.replace(SHALLOW.noise_schedule, prediction_type="v_prediction")
    )
    (tmp_path / "effective_config.json").write_text(json.dumps({"model": dataclasses.asdict(predicts_v)}))
    source = choose_config(open_weights(tmp_path / "dreambooth_epoch_1.ckpt"))
    assert source.config == predicts_v and source.is_stated
    save_weights(weights, tmp_path / "another.ckpt")  # which the run did not write
    with pytest.raises(ConfigError, match="no configuration in configs/ fits"):
        choose_config(open_weights(tmp_path / "another.ckpt"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "my dog").mkdir()
    for version in VERSIONS.values():
        (tmp_path / "models" / version.file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_versions_choose_the_published_file(home, monkeypatch):
    train = ["--instance_data_dir=my dog", "--instance_prompt=a", "--with_prior_preservation=False"]
    for version, known in VERSIONS.items():
        assert parse_options(TrainOptions, [*train, "-v", version]).checkpoint.name == known.file
        assert parse_options(SampleOptions, ["--version", version]).checkpoint.name == known.file
        monkeypatch.setenv("SD_VERSION", version)
        assert parse_options(TrainOptions, train).checkpoint.name == known.file
        assert parse_options(SampleOptions, []).version == version
        assert parse_options(SampleOptions, ["-v", "2.0"]).version == "2.0"  # the flag before the environment
        monkeypatch.delenv("SD_VERSION")
    assert parse_options(TrainOptions, train).checkpoint.name == "sd_v2_base-57526ee4.ckpt"
    monkeypatch.setenv("SD_VERSION", "3")
    with pytest.raises(SystemExit):
        parse_options(SampleOptions, [])


def test_a_folder_of_diffusers_is_the_checkpoint(home):
    (home / "models/sd-2-1/unet").mkdir(parents=True)
    train = ["--instance_data_dir=my dog", "--instance_prompt=a", "--with_prior_preservation=False"]
    for words in (["--pretrained_model_path=models/sd-2-1"], ["--pretrained_model_file=sd-2-1"]):
        assert str(parse_options(TrainOptions, [*train, *words]).checkpoint) == "models/sd-2-1"
