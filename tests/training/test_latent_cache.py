"""Training from the cache is the training without it; the cache is never out of date; released weights are still saved."""

import dataclasses
import logging
import weakref

import numpy as np
import pytest
from conftest import SHALLOW, in_half, random_model, weights_as_arrays, write_pictures
from mindspore import Tensor

from ldm.options import TrainOptions
from ldm.ranks import Ranks
from ldm.training import latent_cache
from ldm.training.latent_cache import Encoding, LatentCache, encoder_digest
from ldm.training.samples import DreamBoothData
from ldm.training.trainer import Trainer, total_updates
from ldm.weights.checkpoint import read_checkpoint
from train_dreambooth import moments_of

OPTIONS = TrainOptions(
    instance_prompt="a photo of sks dog", class_prompt="a photo of a dog", train_batch_size=2, image_size=32, epochs=2,
    train_data_repeats=2, start_learning_rate=1e-3, random_crop=True, train_text_encoder=False,
)  # fmt: skip
COUNT = 8  # samples of the tests below: two epochs of two pictures drawn twice


def make_data(folder, random_crop=True, seed=0) -> DreamBoothData:
    instance, classes = write_pictures(folder / "instance", 2), write_pictures(folder / "class", 3, seed=1)
    return DreamBoothData(instance, classes, 2, 32, random_crop, seed)


def train(tmp_path, caches: bool):
    """Losses, frozen weights before, the checkpoint after."""
    model, data = random_model(SHALLOW), make_data(tmp_path)
    frozen = {name: value for name, value in weights_as_arrays(model).items() if not name.startswith("model.")}
    moments = Encoding(model.first_stage_model, data)
    if caches:
        moments = LatentCache(data, SHALLOW, encoder_digest(model.first_stage_model, SHALLOW), tmp_path / "latents")
        moments.load(total_updates(OPTIONS, data.samples_per_epoch) * OPTIONS.samples_per_update)
        list(moments.encode(model.first_stage_model, 2 * OPTIONS.train_batch_size))
    trainer = Trainer(model, SHALLOW, OPTIONS, data, moments)
    output = tmp_path / ("cached" if caches else "plain")
    output.mkdir()
    if caches:
        networks = [weakref.ref(model.first_stage_model), weakref.ref(model.cond_stage_model)]
        trainer.release_frozen(output)
        assert [network() for network in networks] == [None, None]
        assert not list(output.iterdir())  # the file of the released weights has no name
    losses = [report.loss for report in trainer.run()]
    return np.array(losses), frozen, read_checkpoint(trainer.save(output, 1)[0])


def test_training_from_the_cache_is_the_same_and_the_checkpoint_whole(tmp_path):
    losses, frozen, without = train(tmp_path, caches=False)
    cached_losses, _, cached = train(tmp_path, caches=True)
    # A picture stands beside others in its batch, which may round a convolution differently; so far nothing does here.
    differences = [np.abs(cached[name] - without[name]).max() for name in cached]
    print(f"largest difference: losses {np.abs(cached_losses / losses - 1).max():.1e} relative, weights {max(differences):.1e}")
    assert len(losses) == 4 and np.allclose(cached_losses, losses, rtol=1e-6, atol=0)
    assert cached.keys() == without.keys() == weights_as_arrays(random_model(SHALLOW)).keys()
    assert all(np.array_equal(cached[name], value) for name, value in frozen.items())
    assert max(differences) <= 1e-6


class FakeEncode:
    """In place of the VAE's encoder: counts its calls and answers with something of the pixels."""

    calls = 0

    def __init__(self, autoencoder) -> None:
        pass

    def __call__(self, pixels: Tensor) -> Tensor:
        FakeEncode.calls += 1
        assert pixels.shape == (4, 3, 32, 32)
        return Tensor(np.tile(pixels.asnumpy()[:, :1, ::2, ::2], (1, 8, 1, 1)))


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    """A function that fills a cache and returns it, the entries found and made, and the batches encoded."""
    monkeypatch.setattr(latent_cache, "Encode", FakeEncode)
    monkeypatch.setattr(FakeEncode, "calls", 0)

    def fill(data, digest=b"vae", folder=tmp_path / "latents"):
        cache, before = LatentCache(data, SHALLOW, digest, folder), FakeEncode.calls
        found, missing = cache.load(COUNT)
        assert sum(cache.encode(None, 4)) == missing
        return cache, found, missing, FakeEncode.calls - before

    return fill


def test_each_draw_gets_the_moments_of_its_own_crop(tmp_path, encoded):
    data = make_data(tmp_path)
    cache, *_ = encoded(data)
    for draws in data.batches(2, 4):
        moments = cache(draws)
        assert moments.shape == (4, 8, 16, 16) and moments.dtype == np.float32
        assert np.array_equal(moments[:, 3], np.stack([data.pixels(draw)[0, ::2, ::2] for draw in draws]))


def test_a_second_run_encodes_nothing_and_another_crop_or_vae_or_pixel_is_a_miss(tmp_path, encoded):
    data = make_data(tmp_path, random_crop=False)
    assert encoded(data)[1:] == (0, 5, 2)
    assert encoded(data)[1:] == (5, 0, 0)
    assert encoded(data, digest=b"another")[1:] == (0, 5, 2)
    picture = data.instance_paths[0]
    write_pictures(tmp_path / "other", 1, seed=5)[0].replace(picture)
    assert encoded(make_data_of(data))[1:] == (4, 1, 1)
    assert encoded(make_data_of(data, random_crop=True))[2] > 0
    assert len(list((tmp_path / "latents").iterdir())) > 11
    data.class_paths[0].write_bytes(picture.read_bytes())  # the same picture twice is one entry
    assert encoded(make_data_of(data))[1:] == (4, 0, 0)


def make_data_of(data, random_crop=False) -> DreamBoothData:
    """The same folders read anew."""
    return DreamBoothData(data.instance_paths, data.class_paths, data.repeats, data.size, random_crop, data.seed)


def test_damaged_entries_are_encoded_again(tmp_path, encoded, caplog):
    data = make_data(tmp_path, random_crop=False)
    cache, *_ = encoded(data)
    entries = sorted((tmp_path / "latents").iterdir())
    good = [path.read_bytes() for path in entries]
    entries[0].write_bytes(good[0][:-5])
    entries[1].write_text("hello")
    np.save(entries[2], np.zeros((8, 4, 4), np.float32))
    np.save(entries[3], np.array([{}], object), allow_pickle=True)
    with caplog.at_level(logging.WARNING):
        again, found, missing, _ = encoded(data)
    assert (found, missing) == (1, 4) and len(caplog.records) == 4
    assert [path.read_bytes() for path in entries] == good
    assert np.array_equal(again(data.draws(0, 4)), cache(data.draws(0, 4)))


def test_an_unwritable_folder_is_one_warning_and_an_interrupted_run_goes_on(tmp_path, encoded, caplog):
    data = make_data(tmp_path, random_crop=False)
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        cache, found, missing, _ = encoded(data, folder=tmp_path / "file/latents")
    assert (found, missing) == (0, 5) and len(caplog.records) == 1
    assert cache(data.draws(0, 2)).shape == (4, 8, 16, 16)
    interrupted = LatentCache(data, SHALLOW, b"vae", tmp_path / "latents")
    interrupted.load(COUNT)
    next(interrupted.encode(None, 4))
    assert encoded(data)[1:] == (4, 1, 1)


def test_the_digest_is_of_the_encoder_alone():
    model = random_model(SHALLOW)
    digest = encoder_digest(model.first_stage_model, SHALLOW)
    assert digest == encoder_digest(random_model(SHALLOW).first_stage_model, SHALLOW)
    assert digest != encoder_digest(model.first_stage_model, in_half(SHALLOW))
    other = dataclasses.replace(SHALLOW, autoencoder=dataclasses.replace(SHALLOW.autoencoder, norm_groups=8))
    assert digest != encoder_digest(model.first_stage_model, other)
    model.first_stage_model.decoder.conv_in.bias.set_data(Tensor(np.zeros(32, np.float32)))
    assert digest == encoder_digest(model.first_stage_model, SHALLOW)
    bias = model.first_stage_model.quant_conv.bias
    bias.set_data(Tensor(np.nextafter(bias.asnumpy(), np.float32(1))))
    assert digest != encoder_digest(model.first_stage_model, SHALLOW)


def test_processes_without_a_common_folder_encode_for_themselves(tmp_path, encoded, monkeypatch, caplog):
    """Each its share first, then what it cannot find of the others'."""
    data, model = make_data(tmp_path), random_model(SHALLOW)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    for home, unseen in ((tmp_path / "file", True), (tmp_path / "own", True), (tmp_path / "own", False)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        caplog.clear()
        cache = moments_of(model.first_stage_model, OPTIONS, SHALLOW, data, Ranks(0, 2))
        assert cache(data.draws(0, COUNT)).shape == (2 * COUNT, 8, 16, 16)
        assert ("latents of other processes are not all there" in caplog.text) == unseen
