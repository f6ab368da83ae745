"""UNet, VAE and text encoder against diffusers and transformers with the same random weights."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
import torch
from conftest import (
    DEEP,
    ROOT,
    V1,
    in_half,
    official_table,
    random_model,
    relative_error,
    torch_networks,
    weights_as_arrays,
    write_pictures,
)
from mindspore import ops
from mindspore.nn.utils import no_init_parameters
from network_outputs import inputs, outputs, reference_outputs
from trainings import make_inputs

from ldm.config import read_model_config
from ldm.networks.autoencoder import Decode, Encode
from ldm.networks.latent_diffusion import build_model
from ldm.networks.layer_set import layers_of_this_device
from ldm.options import TrainOptions
from ldm.subjects import Picture, Subject
from ldm.training.samples import DreamBoothSamples
from ldm.training.trainer import build_trainer
from ldm.versions import VERSIONS
from ldm.weights.diffusers_names import diffusers_names

CONFIG = ROOT / "configs/train_dreambooth_sd_v2.yaml"
# Both sides sum the same float32 products in another order: a few rounding errors of 6e-8 for each of ~30
# layers.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
HALF_TOLERANCE = 2e-2  # float16 keeps 11 bits, 5e-4 a rounding


@pytest.fixture(scope="module")
def full_size():
    return build_model(read_model_config(CONFIG))


def official_shapes(version: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _) in official_table(version).items()}


def test_full_size_names_and_shapes_are_the_official_ones(full_size):
    shapes = official_shapes("v2_base")
    assert len(shapes) == 1214
    assert {p.name: tuple(p.shape) for p in full_size.get_parameters()} == shapes


def test_full_size_names_and_shapes_of_stable_diffusion_1():
    model, shapes = build_model(read_model_config(ROOT / VERSIONS["1.5"].model_config)), official_shapes("v1")
    assert len(shapes) == 1082
    assert {p.name: tuple(p.shape) for p in model.get_parameters()} == shapes


def test_building_the_trainer_renames_nothing(tmp_path, full_size):
    options = TrainOptions(
        instance_prompt="a sks dog", class_prompt="a dog", gradient_accumulation_steps=2, use_ema=True
    )
    pictures = [Picture(path, options.instance_prompt) for path in write_pictures(tmp_path, 2)]
    config = read_model_config(CONFIG)
    with no_init_parameters():  # moments and averages of a billion parameters, without their memory
        subjects, classes = [Subject(pictures, 40)], [pictures]
        samples = DreamBoothSamples.of(options, subjects, classes)
        inputs = make_inputs(full_size, config, options, samples)
        trainer = build_trainer(full_size, inputs, options, config)
    assert {p.name: tuple(p.shape) for p in full_size.get_parameters()} == official_shapes("v2_base")
    trained = {p.name for p in trainer.masters.trained}
    assert trained == {
        name for name in official_shapes("v2_base") if not name.startswith("first_stage_model.")
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs(config, batch):
    model = random_model(config)
    given = inputs(config, batch)
    reference = reference_outputs(torch_networks(weights_as_arrays(model), config), *given)
    errors = {name: relative_error(ours, reference[name]) for name, ours in outputs(model, *given).items()}
    print(errors)
    assert max(errors.values()) <= OUTPUT_TOLERANCE


def test_outputs_in_float16(config):
    model = random_model(in_half(config))
    assert {p.dtype for p in model.get_parameters()} == {ms.float32}
    given = inputs(config, 2)
    reference = reference_outputs(torch_networks(weights_as_arrays(model), config), *given)
    ours = outputs(model, *given)
    errors = {name: relative_error(ours[name], reference[name]) for name in ours}
    print(errors)
    assert 1e-6 < max(errors.values()) <= HALF_TOLERANCE  # above the first figure: it did compute in float16


def test_latents_whose_sides_are_odd():
    """Images of any multiple of 8: a map that was odd before it was down-sampled is so again afterwards."""
    model = random_model(DEEP)
    x, t, context, *_ = inputs(DEEP, 2)
    x = np.random.default_rng(1).standard_normal((2, 4, 7, 11)).astype(np.float32)
    unet, vae, _ = torch_networks(weights_as_arrays(model), DEEP)
    with torch.no_grad():
        wanted = unet(*map(torch.from_numpy, (x, t.astype(np.int64), context))).sample
        picture = vae.decode(torch.from_numpy(x)).sample
    assert relative_error(model.unet(*map(ms.Tensor, (x, t, context))).asnumpy(), wanted) <= OUTPUT_TOLERANCE
    ours = Decode(model.first_stage_model)(ms.Tensor(x)).asnumpy()
    assert ours.shape == (2, 3, 28, 44) and relative_error(ours, picture) <= OUTPUT_TOLERANCE


def test_scores_that_overflow_in_float16_are_multiplied_in_float32():
    """Stable Diffusion 2.1's: with queries and keys of 300 a score is 90,000 and more."""
    config = dataclasses.replace(V1.unet, num_heads=1)
    rng, answers = np.random.default_rng(0), {}
    x = rng.choice([-300.0, 300.0], (1, 6, 16))
    for upcast in (False, True):
        layers = layers_of_this_device(ms.float16)
        given = ms.Tensor(x, layers.dtype)
        attention = layers.Attention(config.heads(16), upcast=upcast)
        answers[upcast] = attention(given, given, given).asnumpy().astype(np.float64)
    q = x[0]
    scores = q @ q.T / 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ q
    assert np.abs(scores).max() > np.finfo(np.float16).max
    assert not np.isfinite(answers[False]).all()
    assert relative_error(answers[True][0], wanted) <= 1e-3  # float16 keeps 11 bits


@pytest.mark.parametrize("upcast", [False, True])
def test_a_unet_whose_scores_overflow_in_float16(upcast):
    """As that of Stable Diffusion 2.1: without float32 scores it answers NaN."""
    config = dataclasses.replace(in_half(V1), unet=dataclasses.replace(V1.unet, upcast_attention=upcast))
    model = random_model(config)
    for parameter in model.get_parameters():
        if parameter.name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            parameter.set_data(parameter * 400)
    x, t, context, *_ = inputs(config, 1)
    answer = model.unet(*map(ms.Tensor, (x, t, context))).asnumpy()
    assert np.isfinite(answer).all() == upcast


def ours_and_reference_gradients(model, config, network, reference, forward, reference_forward):
    """Name to (ours, reference), for every parameter of a network."""
    parameters = network.trainable_params()
    gradients = ms.value_and_grad(forward, None, parameters)()[1]
    reference_forward().backward()
    of_torch = dict(reference.named_parameters())
    for parameter, ours in zip(parameters, gradients):
        _, names = diffusers_names(parameter.name, config)
        names = [n if n in of_torch else n.removeprefix("text_model.") for n in names]
        theirs = np.concatenate([of_torch[name].grad.numpy() for name in names]).reshape(ours.shape)
        yield parameter.name, ours.asnumpy(), theirs


def test_gradients_of_every_parameter(config):
    model = random_model(config)
    unet, vae, text_encoder = torch_networks(weights_as_arrays(model), config)
    x, t, context, token_ids, pixels = inputs(config, 2)
    rng = np.random.default_rng(9)
    weight = rng.standard_normal(x.shape).astype(np.float32)
    text_weight = rng.standard_normal(context.shape).astype(np.float32)
    pixel_weight = rng.standard_normal(
        (2, 3, *(side * config.autoencoder.downsampling for side in x.shape[2:]))
    ).astype(np.float32)
    moment_weight = rng.standard_normal(
        (2, 8, *(side // config.autoencoder.downsampling for side in pixels.shape[2:]))
    ).astype(np.float32)
    tensor, as_torch = ms.Tensor, torch.from_numpy
    encode, decode = Encode(model.first_stage_model), Decode(model.first_stage_model)
    args = [
        tensor(a)
        for a in (x, t, context, token_ids, pixels, weight, text_weight, pixel_weight, moment_weight)
    ]
    mx, mt, mc, mi, mp, mw, mtw, mpw, mmw = args

    def unet_loss():
        return (model.unet(mx, mt, mc) * mw).sum()

    def text_loss():
        return (model.cond_stage_model(mi) * mtw).sum()

    def vae_loss():
        return ops.cat(((encode(mp) * mmw).reshape(-1), (decode(mx) * mpw).reshape(-1))).sum()

    def reference_unet_loss():
        return (unet(as_torch(x), as_torch(t).long(), as_torch(context)).sample * as_torch(weight)).sum()

    def reference_text_loss():
        return (text_encoder(as_torch(token_ids).long())[0] * as_torch(text_weight)).sum()

    def reference_vae_loss():
        moments, decoded = vae.encode(as_torch(pixels)).latent_dist.parameters, vae.decode(as_torch(x)).sample
        return (moments * as_torch(moment_weight)).sum() + (decoded * as_torch(pixel_weight)).sum()

    cases = [
        (model.unet, unet, unet_loss, reference_unet_loss),
        (model.cond_stage_model, text_encoder, text_loss, reference_text_loss),
        (model.first_stage_model, vae, vae_loss, reference_vae_loss),
    ]
    compared = 0
    for network, reference, forward, reference_forward in cases:
        network.set_grad()
        rows = list(
            ours_and_reference_gradients(model, config, network, reference, forward, reference_forward)
        )
        typical = np.median([np.abs(theirs).max() for _, _, theirs in rows])
        for name, ours, theirs in rows:
            # A key bias shifts every score of a row alike, so its gradient is zero but for rounding: hence
            # the floor.
            floor = 1e-3 * typical
            error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), floor)
            assert error <= GRADIENT_TOLERANCE, f"{name}: {error:.1e}"
            compared += 1
    assert compared == len(list(model.get_parameters()))


def test_later_tokens_do_not_change_earlier_features(config):
    model = random_model(config)
    ids = np.random.default_rng(0).integers(1, 49000, (1, 77)).astype(np.int32)
    changed = ids.copy()
    changed[:, 40:] = 7
    a, b = (model.cond_stage_model(ms.Tensor(x)).asnumpy() for x in (ids, changed))
    assert np.array_equal(a[:, :40], b[:, :40]) and not np.allclose(a[:, 40:], b[:, 40:])
