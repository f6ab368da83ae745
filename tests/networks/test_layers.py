"""The layers of an accelerator: built and run on a CPU, against the layers of a CPU; and what they choose for
a device.
"""

import inspect

import mindspore as ms
import numpy as np
import pytest
from conftest import SHALLOW, random_model, relative_error, torch_networks, weights_as_arrays
from mindspore import ops
from network_outputs import inputs, outputs, reference_outputs

from ldm.networks import layers, layers_cpu
from ldm.networks.latent_diffusion import build_model
from ldm.networks.layer_set import LayerSet
from ldm.networks.layers import has_flash_attention


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Ascend910B2", True),
        ("Ascend910_9391", True),
        ("Ascend910A", False),
        ("Ascend910ProB", False),
        ("CPU", False),
    ],
)
def test_where_attention_is_fused(name, expected):
    assert has_flash_attention(name) is expected


def test_the_fused_attention_takes_the_arguments_it_is_called_with():
    arguments = (
        inspect.signature(ops.flash_attention_score)
        .bind("q", "k", "v", 5, scalar_value=0.125, input_layout="BSH")
        .arguments
    )
    assert list(arguments)[:4] == ["query", "key", "value", "head_num"]


def test_both_modules_have_the_same_layers_with_the_same_arguments():
    for name in vars(LayerSet(layers)).keys() - {"dtype", "AddPerChannel"}:
        ours, cpus = (inspect.signature(getattr(module, name)) for module in (layers, layers_cpu))
        assert list(ours.parameters) == list(cpus.parameters), name


def accelerator_model(config, weights):
    """The networks as an accelerator has them, with the given weights."""
    dtype = ms.float16 if config.use_fp16 else ms.float32
    model = build_model(config, initialise=True, layers=LayerSet(layers, dtype))
    for parameter in model.get_parameters():
        parameter.set_data(ms.Tensor(weights[parameter.name]))
    return model


def test_the_accelerators_networks_answer_as_pytorchs():
    """Against diffusers and transformers, as tests/networks/test_networks.py has those of a CPU."""
    weights = weights_as_arrays(random_model(SHALLOW))
    given = inputs(SHALLOW, 2)
    reference = reference_outputs(torch_networks(weights, SHALLOW), *given)
    ours = outputs(accelerator_model(SHALLOW, weights), *given)
    errors = {name: relative_error(ours[name], reference[name]) for name in ours}
    print(errors)
    assert max(errors.values()) <= 1e-4


def unet_gradients(model, x, t, context, weight) -> list[np.ndarray]:
    unet = model.unet.set_grad()

    def weighted_sum():
        return (unet(x, t, context) * weight).sum()

    gradients = ms.value_and_grad(weighted_sum, None, unet.trainable_params())()[1]
    return [gradient.asnumpy() for gradient in gradients]


def test_the_accelerators_gradients_are_those_of_a_cpu():
    """Of the UNet. A key's bias has a gradient of rounding only: hence the floor."""
    cpu = random_model(SHALLOW)
    x, t, context, *_ = (ms.Tensor(array) for array in inputs(SHALLOW, 2))
    weight = ms.Tensor(np.random.default_rng(9).standard_normal(x.shape).astype(np.float32))
    models = (cpu, accelerator_model(SHALLOW, weights_as_arrays(cpu)))
    found = [unet_gradients(model, x, t, context, weight) for model in models]
    floor = 1e-3 * np.median([np.abs(gradient).max() for gradient in found[0]])
    errors = [np.abs(a - b).max() / max(np.abs(a).max(), floor) for a, b in zip(*found, strict=True)]
    print(f"largest relative difference {max(errors):.1e}")
    assert max(errors) <= 1e-4
