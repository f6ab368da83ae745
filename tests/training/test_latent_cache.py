"""Training from the cache is the training without it; the cache is never out of date."""

import dataclasses
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHALLOW, in_half, random_model, write_pictures
from mindspore import Tensor
from trainings import make_inputs, progress_of, samples_of, weights_of_trainer

from ldm.options import TrainOptions
from ldm.ranks import ALONE, Ranks
from ldm.training import latent_cache
from ldm.training.latent_cache import Encoding, LatentCache, encoder_digest
from ldm.training.samples import Cropping, DreamBoothSamples
from ldm.training.trainer import build_trainer

OPTIONS = TrainOptions(
    instance_prompt="a photo of sks dog", class_prompt="a photo of a dog", train_batch_size=2, image_size=32,
    epochs=2,
    train_data_repeats=2, start_learning_rate=1e-3, random_crop=True, train_text_encoder=False,
)  # fmt: skip
COUNT = 8  # samples of the tests below: two epochs of two images used twice


def make_samples(folder, random_crop=True, seed=0) -> DreamBoothSamples:
    instance, classes = write_pictures(folder / "instance", 2), write_pictures(folder / "class", 3, seed=1)
    return samples_of(instance, classes, 2, Cropping(32, random_crop), seed)


def no_bar(total):
    return nullcontext(SimpleNamespace(update=lambda count: None))


def train(tmp_path, caches: bool):
    """Losses, and the weights after."""
    model, samples = random_model(SHALLOW), make_samples(tmp_path)
    progress = progress_of(OPTIONS, samples)
    moments = Encoding(model.first_stage_model, samples)
    if caches:
        moments = moments.cached(SHALLOW, tmp_path / "latents", progress.total_samples, 2, ALONE, no_bar)
    inputs = make_inputs(model, SHALLOW, OPTIONS, samples, moments)
    trainer = build_trainer(model, inputs, OPTIONS, SHALLOW)
    return np.array([report.loss for report in trainer.updates(progress)]), weights_of_trainer(trainer)


def test_training_from_the_cache_is_the_same(tmp_path):
    losses, without = train(tmp_path, caches=False)
    cached_losses, cached = train(tmp_path, caches=True)
    # An image stands beside others in its batch, which may round a convolution differently; so far nothing
    # does here.
    differences = [np.abs(cached[name] - without[name]).max() for name in cached]
    relative = np.abs(cached_losses / losses - 1).max()
    print(f"largest difference: losses {relative:.1e} relative, weights {max(differences):.1e}")
    assert len(losses) == 4 and np.allclose(cached_losses, losses, rtol=1e-6, atol=0)
    assert cached.keys() == without.keys() and max(differences) <= 1e-6


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

    def fill(samples, digest=b"vae", folder=tmp_path / "latents"):
        cache, before = LatentCache(samples, SHALLOW, digest, folder), FakeEncode.calls
        missing = cache.load(COUNT)
        found = len(cache._moments)
        assert sum(cache.encode(None, 4, missing)) == len(missing)
        return cache, found, len(missing), FakeEncode.calls - before

    return fill


def test_each_sample_gets_the_moments_of_its_own_crop(tmp_path, encoded):
    samples = make_samples(tmp_path)
    cache, *_ = encoded(samples)
    for picked in samples.batches(2, 4):
        moments = cache(picked)
        assert moments.shape == (4, 8, 16, 16) and moments.dtype == np.float32
        assert np.array_equal(
            moments[:, 3], np.stack([samples.pixels(sample)[0, ::2, ::2] for sample in picked])
        )


def test_a_second_run_encodes_nothing_and_another_crop_or_vae_or_pixel_is_a_miss(tmp_path, encoded):
    samples = make_samples(tmp_path, random_crop=False)
    assert encoded(samples)[1:] == (0, 5, 2)
    assert encoded(samples)[1:] == (5, 0, 0)
    assert encoded(samples, digest=b"another")[1:] == (0, 5, 2)
    picture = samples.subjects[0].pictures[0].path
    write_pictures(tmp_path / "other", 1, seed=5)[0].replace(picture)
    assert encoded(samples_again(samples))[1:] == (4, 1, 1)
    assert encoded(samples_again(samples, random_crop=True))[2] > 0
    assert len(list((tmp_path / "latents").iterdir())) > 11
    samples.classes[0][0].path.write_bytes(picture.read_bytes())  # the same picture twice is one entry
    assert encoded(samples_again(samples))[1:] == (4, 0, 0)


def samples_again(samples, random_crop=False) -> DreamBoothSamples:
    """The same folders read anew."""
    cropping = Cropping(samples.size, random_crop)
    return DreamBoothSamples(samples.subjects, samples.classes, cropping, samples.seed)


def test_damaged_entries_are_encoded_again(tmp_path, encoded, caplog):
    samples = make_samples(tmp_path, random_crop=False)
    cache, *_ = encoded(samples)
    entries = sorted((tmp_path / "latents").iterdir())
    good = [path.read_bytes() for path in entries]
    entries[0].write_bytes(good[0][:-5])
    entries[1].write_text("hello")
    np.save(entries[2], np.zeros((8, 4, 4), np.float32))
    np.save(entries[3], np.array([{}], object), allow_pickle=True)
    with caplog.at_level(logging.WARNING):
        again, found, missing, _ = encoded(samples)
    assert (found, missing) == (1, 4) and len(caplog.records) == 4
    assert [path.read_bytes() for path in entries] == good
    assert np.array_equal(again(samples.pick(0, 4)), cache(samples.pick(0, 4)))


def test_an_unwritable_folder_is_one_warning_and_an_interrupted_run_goes_on(tmp_path, encoded, caplog):
    samples = make_samples(tmp_path, random_crop=False)
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        cache, found, missing, _ = encoded(samples, folder=tmp_path / "file/latents")
    assert (found, missing) == (0, 5) and len(caplog.records) == 1
    assert cache(samples.pick(0, 2)).shape == (4, 8, 16, 16)
    interrupted = LatentCache(samples, SHALLOW, b"vae", tmp_path / "latents")
    next(interrupted.encode(None, 4, interrupted.load(COUNT)))
    assert encoded(samples)[1:] == (4, 1, 1)


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
    samples = make_samples(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    for folder, unseen in (
        (tmp_path / "file/latents", True),
        (tmp_path / "own", True),
        (tmp_path / "own", False),
    ):
        caplog.clear()
        cache = LatentCache(samples, SHALLOW, b"vae", folder)
        cache.fill(None, COUNT, 4, Ranks(0, 2), no_bar)
        assert cache(samples.pick(0, COUNT)).shape == (2 * COUNT, 8, 16, 16)
        assert ("latents of other processes are not all there" in caplog.text) == unseen


def test_moments_that_are_not_finite_name_the_picture_and_are_not_kept(tmp_path, encoded, monkeypatch):
    samples = make_samples(tmp_path, random_crop=False)
    whole = FakeEncode.__call__

    def broken(self, pixels):
        moments = whole(self, pixels).asnumpy().copy()
        moments[1] = np.nan
        return Tensor(moments)

    monkeypatch.setattr(FakeEncode, "__call__", broken)
    second = samples.crops(COUNT)[1][0].name
    with pytest.raises(FloatingPointError, match=f"{second}: the VAE's latents of it are NaN or infinite"):
        encoded(samples)
    (kept,) = (tmp_path / "latents").iterdir()  # of the picture before
    with pytest.raises(FloatingPointError, match="the VAE's latents of it"):
        Encoding(None, samples)(samples.pick(0, 2))
    # as older versions kept it
    np.save(kept, np.full((8, 16, 16), np.inf, np.float32))
    monkeypatch.setattr(FakeEncode, "__call__", whole)
    assert encoded(samples)[1:3] == (0, 5)
