"""Training of low-rank additions against PEFT, and what they begin as."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SHALLOW, V1, random_model, torch_networks, weights_as_arrays
from peft import LoraConfig
from torch_training import torch_training
from trainings import OPTIONS, make_samples, make_trainer

from ldm.training.lora import plan_lora
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
    before = {name: np.array(p.asnumpy()) for name, p in trainer.weights().items()}
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
            for values in (parameter.asnumpy(), final[names[name]])
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
