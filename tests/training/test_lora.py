"""Training of low-rank additions against PEFT, and what they begin as."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
import torch
from conftest import SHALLOW, V1, in_half, random_model, torch_networks, weights_as_arrays
from loras import random_pairs, units_in, written
from network_outputs import inputs
from peft import LoraConfig
from torch_training import torch_training
from trainings import OPTIONS, make_samples, make_trainer

from ldm.training.lora import plan_lora
from ldm.training.trained import make_trainable
from ldm.values import ConfigError
from ldm.weights.arrays import as_numpy
from ldm.weights.lora_units import DOWN, UP

STEPS = 20
LORA = dataclasses.replace(OPTIONS, use_lora=True, lora_rank=3, lora_alpha=6.0, start_learning_rate=1e-3)


def with_peft(networks, options, plan, weights):
    """PEFT's adapters in diffusers' UNet and transformers' text encoder, with the given A and B.

    Returns:
        The networks, and the name of each adapter's weights by the name of ours.
    """
    unet, vae, text_encoder = networks
    names = {}
    for folder, network in (("unet", unet), ("text_encoder", text_encoder)):
        network.requires_grad_(False)
        modules = {module.replace("text_model.", "") for module, _ in network.named_modules()}
        found = {}  # their name of a module to ours
        for name, unit in plan.units.items():
            where, _, module = unit.diffusers.partition(".")
            if where == folder:
                assert module.replace("text_model.", "") in modules
                found[module if folder == "unet" else module.replace("text_model.", "")] = name
        if not found:
            continue
        network.add_adapter(
            LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=list(found))
        )
        for name, parameter in network.named_parameters():
            for ending, own in ((".lora_A.default.weight", DOWN), (".lora_B.default.weight", UP)):
                if name.endswith(ending):
                    ours = found[name.removesuffix(ending)] + own
                    names[ours] = folder, name
                    parameter.data = torch.from_numpy(weights[ours].reshape(parameter.shape).copy())
    return (unet, vae, text_encoder), names


def compare(tmp_path, config, options):
    """Largest relative difference of the losses, and relative L2 difference of the change of A and B."""
    samples, model = make_samples(tmp_path, options), random_model(config)
    base = weights_as_arrays(model)
    options, plan = plan_lora(options, config, model)
    trainer = make_trainer(model, config, options, samples)
    before = {name: np.array(as_numpy(p)) for name, p in trainer.weights().items()}
    assert len(before) == 2 * len(plan.units) and not any(before[name + UP].any() for name in plan.units)
    ours = np.array([trainer.one_update()[0] for _ in range(STEPS)])
    assert all(np.array_equal(p.asnumpy(), base.get(p.name, p.asnumpy())) for p in model.get_parameters())
    networks, names = with_peft(torch_networks(base, config), options, plan, before)
    assert names.keys() == before.keys()
    theirs, final = torch_training(networks, config, options, samples, STEPS)
    difference = change = 0.0
    for name, parameter in trainer.weights().items():
        moved, reference = (
            values.reshape(before[name].shape) - before[name]
            for values in (as_numpy(parameter), final[names[name]])
        )
        assert np.abs(reference).max() > 0, name
        difference += np.square(moved - reference, dtype=np.float64).sum()
        change += np.square(reference, dtype=np.float64).sum()
    return np.abs(ours / theirs - 1).max(), np.sqrt(difference / change)


VARIANTS = {
    "attention_text_encoder_accumulation_clipping": (
        SHALLOW, dict(gradient_accumulation_steps=2, clip_grad=True, max_grad_norm=0.05)
    ),
    "feed_forward_recompute": (
        SHALLOW, dict(lora_targets="+feed_forward", recompute=True, train_text_encoder=False)
    ),
    "projections_of_stable_diffusion_1": (V1, dict(lora_targets="projections", train_text_encoder=False)),
    "convolutions": (SHALLOW, dict(lora_targets="convolutions", train_text_encoder=False)),
}  # fmt: skip


@pytest.mark.parametrize("config, changes", VARIANTS.values(), ids=VARIANTS)
def test_twenty_updates_equal_peft(tmp_path, config, changes):
    loss_error, weight_error = compare(tmp_path, config, dataclasses.replace(LORA, **changes))
    print(f"largest relative loss difference {loss_error:.2e}, change of A and B {weight_error:.2e}")
    assert loss_error <= 1e-4
    assert weight_error <= 1e-3


def test_twenty_updates_of_an_accelerator_equal_peft(tmp_path, accelerator):
    loss_error, weight_error = compare(tmp_path, SHALLOW, dataclasses.replace(LORA, clip_grad=True))
    print(f"largest relative loss difference {loss_error:.2e}, change of A and B {weight_error:.2e}")
    assert loss_error <= 1e-4 and weight_error <= 1e-3


ALL = "+feed_forward+projections+convolutions"


@pytest.mark.parametrize("config", [SHALLOW, V1], ids=["sd2", "sd1"])
def test_additions_begin_as_nothing(config):
    """What the networks answer is bit for bit as before; names and frozen weights stay; A is Kaiming
    uniform.
    """
    options = dataclasses.replace(LORA, lora_targets=ALL, lora_rank=64)
    model = random_model(config)
    given, before, names = inputs(config, 2), weights_as_arrays(model), model.parameter_names()
    plain = {
        "unet": model.unet(*map(ms.Tensor, given[:3])),
        "text": model.cond_stage_model(ms.Tensor(given[3])),
    }
    _, plan = plan_lora(options, config, model)
    added = make_trainable(model, options, plan)
    changed = {
        "unet": model.unet(*map(ms.Tensor, given[:3])),
        "text": model.cond_stage_model(ms.Tensor(given[3])),
    }
    assert all(np.array_equal(plain[name].asnumpy(), changed[name].asnumpy()) for name in plain)
    assert sum(parameter.size for parameter in added) == plan.values
    by_name = {parameter.name: parameter for parameter in model.get_parameters()}
    assert by_name.keys() - before.keys() == {name + end for name in plan.units for end in (DOWN, UP)}
    assert [name for name in by_name if name in before] == names
    assert all(np.array_equal(by_name[name].asnumpy(), values) for name, values in before.items())
    assert {p.name for p in model.get_parameters() if p.requires_grad} == {p.name for p in added}
    for name, unit in plan.units.items():
        a, bound = by_name[name + DOWN].asnumpy(), 1 / np.sqrt(np.prod(unit.shape[1:]))
        assert np.abs(a).max() <= bound and abs(a.std() * np.sqrt(3) / bound - 1) < 0.1


def start_values(**changes) -> dict[str, np.ndarray]:
    options, model = dataclasses.replace(LORA, **changes), random_model(SHALLOW)
    plan = plan_lora(options, SHALLOW, model)[1]
    return {p.name: p.asnumpy() for p in make_trainable(model, options, plan)}


def test_an_addition_begins_the_same_whichever_others_there_are():
    few, many, other = start_values(), start_values(lora_targets=ALL), start_values(seed=1)
    assert few.keys() < many.keys() and all(np.array_equal(many[name], few[name]) for name in few)
    assert not any(np.array_equal(other[name], few[name]) for name in few if name.endswith(DOWN))


def test_frozen_weights_are_kept_in_float16(tmp_path, accelerator):
    config, model = in_half(SHALLOW), random_model(in_half(SHALLOW))
    trainer = make_trainer(model, config, LORA, make_samples(tmp_path, LORA))
    trained = {id(p) for p in trainer.masters.own}
    dtypes = {
        (id(p) in trained, p.name.endswith(".weight"), str(p.dtype)) for p in model.unet.get_parameters()
    }
    assert {(True, True, "Float16"), (False, True, "Float16")} == {kind for kind in dtypes if kind[1]}
    assert {str(p.dtype) for p in trainer.masters.trained} == {"Float32"}
    losses = [trainer.one_update() for _ in range(3)]
    assert np.isfinite([result.losses for result in losses]).all()


def test_going_on_from_a_file(tmp_path):
    """Its ranks and scales stay, additions that it lacks begin new; the file's own values are the start."""
    units = units_in(SHALLOW)
    there = random_pairs(units, rank=5, alpha=2.5, targets=("feed_forward",))
    path = str(written(tmp_path / "a.safetensors", units, there))
    options = dataclasses.replace(LORA, lora_ckpt_path=path, lora_rank=None, lora_alpha=None)
    model = random_model(SHALLOW)
    settled, plan = plan_lora(options, SHALLOW, model)
    assert (settled.lora_rank, settled.lora_alpha) == (5, 2.5)
    assert {unit.target for unit in plan.units.values()} == {"attention", "feed_forward"}
    own = {p.name: p.asnumpy() for p in make_trainable(model, settled, plan)}
    for name, pair in there.items():
        assert np.array_equal(own[name + DOWN], pair.down) and np.array_equal(own[name + UP], pair.up)
    assert sum(not values.any() for values in own.values()) == len(plan.units) - len(there)
    for changes, words in (
        ({"lora_rank": 4}, "lora_rank is 4, .* has 5: leave it out"),
        ({"lora_alpha": 4.0}, "lora_alpha is 4, .* has 2.5"),
        ({"train_text_encoder": False}, "has 4 additions to the text encoder.*scripts/merge_lora.py"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan_lora(dataclasses.replace(options, **changes), SHALLOW, model)
    of_q = {n: p for n, p in random_pairs(units).items() if n.endswith((".in_proj.q", ".in_proj.v"))}
    path = str(written(tmp_path / "b.safetensors", units, of_q))
    options = dataclasses.replace(options, lora_ckpt_path=path, lora_targets="feed_forward")
    with pytest.raises(ConfigError, match="lacks .*in_proj.k beside its neighbours"):
        plan_lora(options, SHALLOW, model)
    assert any(n.endswith(".in_proj.k") for n in plan_lora(
        dataclasses.replace(options, lora_targets="attention"), SHALLOW, model)[1].units)  # fmt: skip
