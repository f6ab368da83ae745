"""What is done with the text encoder apart from the rest."""

import dataclasses

import numpy as np
import pytest
from conftest import SHALLOW, random_model
from mindspore import Tensor
from trainings import OPTIONS, make_samples, make_trainer

from ldm.tokenizer import Tokenizer, token_of
from ldm.training.inputs import features_of
from ldm.training.text_part import TEXT, UNET, WORD, kind_of, ratios_of
from ldm.values import ConfigError
from ldm.weights.embeddings import ROW, put_embeddings, read_embedding, save_embedding

SKS = 48136


def test_features_are_those_of_the_text_encoder_as_it_is_now():
    """MindSpore would take the graph of before for inputs of the same shape."""
    text_encoder, ids = random_model(SHALLOW).cond_stage_model, Tokenizer()(["a sks dog", "a dog"])
    before = features_of(text_encoder, ids)
    row = text_encoder.transformer.take_out_word(SKS)
    assert np.abs(features_of(text_encoder, ids) - before).max() < 1e-6
    row.set_data(Tensor(np.random.default_rng(0).standard_normal((1, 48)).astype(np.float32)))
    after = features_of(text_encoder, ids)
    assert np.abs(after[0] - before[0]).max() > 1e-2 and np.abs(after[1] - before[1]).max() < 1e-6
    other = random_model(SHALLOW).cond_stage_model
    put_embeddings(other.transformer.embedding_table, {SKS: row.asnumpy()[0]})
    assert np.abs(features_of(other, ids) - after).max() < 1e-6
    many = Tokenizer()([f"a dog number {n}" for n in range(11)])  # some at a time
    assert np.abs(features_of(other, many)[9:] - features_of(other, many[9:])).max() < 1e-5


def test_kinds_do_not_depend_on_the_rates():
    """A graph knows the kinds: one that was compiled for some rates is taken for others."""
    names = "model.diffusion_model.x", "cond_stage_model.transformer.y", ROW
    assert [kind_of(name, OPTIONS) for name in names] == [UNET] * 3 and ratios_of(OPTIONS) == (1.0,)
    for text, word in ((2e-4, 1e-4), (5e-5, 1e-2), (1e-4, 1e-4)):
        options = dataclasses.replace(
            OPTIONS, text_encoder_learning_rate=text, token_learning_rate=word, train_token="sks"
        )
        assert [kind_of(name, options) for name in names] == [UNET, TEXT, WORD]
        assert np.allclose(ratios_of(options), (1, text / 1e-4, word / 1e-4))
    stops = dataclasses.replace(OPTIONS, text_encoder_stop=0.5)
    assert kind_of(names[1], stops) == TEXT and ratios_of(stops) == (1, 1, 1)


def test_a_frozen_text_encoder_stays_as_it_was(tmp_path, caplog):
    caplog.set_level("INFO")
    options = dataclasses.replace(OPTIONS, text_encoder_stop=0.025, train_data_repeats=20)
    samples, model = make_samples(tmp_path, options), random_model(SHALLOW)
    trainer = make_trainer(model, SHALLOW, options, samples)
    assert trainer.text_stop.update == 1
    trainer.one_update()
    before = {name: p.asnumpy().copy() for name, p in trainer.weights().items()}
    trainer.one_update()
    assert caplog.text.count("the text encoder is frozen from here on, after update 1") == 1
    for name, p in trainer.weights().items():
        assert np.array_equal(p.asnumpy(), before[name]) == name.startswith("cond_stage_model."), name
    assert all(text.ndim == 2 for text in trainer.inputs.text.values())  # features


def test_a_word_goes_on_from_a_file(tmp_path):
    row = np.random.default_rng(0).standard_normal((1, 48)).astype(np.float32)
    save_embedding("sks", row, tmp_path / "sks.safetensors")
    token, found = read_embedding(tmp_path / "sks.safetensors", 48)
    assert token == SKS and np.array_equal(found, row[0])
    options = dataclasses.replace(
        OPTIONS, train_token="sks", train_text_encoder=False, embedding_path=str(tmp_path / "sks.safetensors")
    )
    samples = make_samples(tmp_path, options)
    trainer = make_trainer(random_model(SHALLOW), SHALLOW, options, samples)
    assert np.array_equal(trainer.state()[0][ROW].asnumpy(), row)
    save_embedding("dog", row, tmp_path / "dog.safetensors")
    options = dataclasses.replace(options, embedding_path=str(tmp_path / "dog.safetensors"))
    with pytest.raises(ConfigError, match="is not of the word of train_token"):
        make_trainer(random_model(SHALLOW), SHALLOW, options, samples)
    save_embedding("two words", row, tmp_path / "two.safetensors")
    with pytest.raises(ConfigError, match="its name must be a word of one token"):
        read_embedding(tmp_path / "two.safetensors", 48)
    with pytest.raises(ConfigError, match="must hold one embedding of 64 values, got <sks>"):
        read_embedding(tmp_path / "sks.safetensors", 64)


def test_a_token_is_a_word_of_one_token():
    assert token_of("sks") == token_of(" SKS ") == SKS
    with pytest.raises(ConfigError, match="'sksdog' has 3: take one such as sks"):
        token_of("sksdog")
    with pytest.raises(ConfigError, match="'sks' is in no instance prompt"):
        token_of("sks", ["a dog", "a desksk"])
