"""The layers of other devices, and those for a CPU without a C++ compiler, against a CPU's that has one."""

import inspect

import cann
import mindspore as ms
import numpy as np
import pytest
from conftest import SHALLOW, in_half, random_model, relative_error, weights_as_arrays
from mindspore import ops
from network_outputs import inputs, outputs

from ldm.networks import kernels, layers, layers_ascend, layers_cpu, layers_native
from ldm.networks.kernels import GELU, GatedGELU, normal_density
from ldm.networks.latent_diffusion import build_model
from ldm.networks.layer_set import LayerSet

MODULES = {"plain": layers, "without_a_compiler": layers_cpu, "ascend": layers_ascend}


def test_the_fused_attention_takes_the_arguments_it_is_called_with():
    arguments = (
        inspect.signature(ops.flash_attention_score)
        .bind("q", "k", "v", 5, attn_mask="mask", scalar_value=0.125, input_layout="BSH")
        .arguments
    )
    assert list(arguments)[:4] == ["query", "key", "value", "head_num"]


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_all_modules_have_the_same_layers_with_the_same_arguments(module):
    for name in vars(LayerSet(layers_native)).keys() - {"dtype", "AddPerChannel"}:
        ours, cpus = (inspect.signature(getattr(place, name)) for place in (module, layers_native))
        assert list(ours.parameters) == list(cpus.parameters), name


def model_of(module, config, weights):
    """The networks of a module's layers, with the given weights."""
    dtype = ms.float16 if config.precision == "float16" else ms.float32
    model = build_model(config, initialise=True, layers=LayerSet(module, dtype))
    for parameter in model.get_parameters():
        parameter.set_data(ms.Tensor(weights[parameter.name]))
    return model


def unet_gradients(model, x, t, context, weight) -> list[np.ndarray]:
    unet = model.unet.set_grad()

    def weighted_sum():
        return (unet(x, t, context) * weight).sum()

    gradients = ms.value_and_grad(weighted_sum, None, unet.trainable_params())()[1]
    return [gradient.asnumpy() for gradient in gradients]


def text_gradients(model, token_ids) -> list[np.ndarray]:
    encoder = model.cond_stage_model.set_grad()
    for _, cell in encoder.cells_and_names():
        if isinstance(
            cell, layers.Attention
        ):  # MindSpore cannot derive what tests/cann.py has for it in a bprop
            cell.can_fuse = False
    rng = np.random.default_rng(9)
    weight = ms.Tensor(rng.standard_normal((*token_ids.shape, SHALLOW.text_encoder.width)).astype(np.float32))

    def weighted_sum():
        return (encoder(token_ids) * weight).sum()

    gradients = ms.value_and_grad(weighted_sum, None, encoder.trainable_params())()[1]
    return [gradient.asnumpy() for gradient in gradients]


@pytest.fixture(scope="module")
def of_a_cpu() -> dict:
    """Weights, inputs, and what a CPU's layers make of them in float32."""
    model, given = random_model(SHALLOW), inputs(SHALLOW, 2)
    return {"weights": weights_as_arrays(model), "given": given} | answers(model, given)


def answers(model, given) -> dict:
    """Outputs of all networks, gradients of the UNet's and of the text encoder's weights."""
    x, t, context, token_ids, _ = (ms.Tensor(array) for array in given)
    weight = ms.Tensor(np.random.default_rng(9).standard_normal(x.shape).astype(np.float32))
    return {
        "outputs": outputs(model, *given),
        "gradients": [unet_gradients(model, x, t, context, weight), text_gradients(model, token_ids)],
    }


# float16 rounds by 5e-4; a difference of order in long sums of them is a few of those
@pytest.mark.parametrize(
    "precision, of_outputs, of_gradients", [("float32", 1e-5, 1e-4), ("float16", 4e-3, 2e-2)]
)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_networks_of_other_devices_are_those_of_a_cpu(
    module, precision, of_outputs, of_gradients, monkeypatch, of_a_cpu
):
    """A key's bias has a gradient of rounding only: hence the floor."""
    if module is layers_ascend:
        cann.put_in_place(monkeypatch)
    config = in_half(SHALLOW) if precision == "float16" else SHALLOW
    found = answers(model_of(module, config, of_a_cpu["weights"]), of_a_cpu["given"])
    expected = of_a_cpu["outputs"]
    errors = {name: relative_error(found["outputs"][name], expected[name]) for name in expected}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= of_outputs
    for theirs, ours in zip(of_a_cpu["gradients"], found["gradients"], strict=True):
        floor = of_gradients * 10 * np.median([np.abs(gradient).max() for gradient in theirs])
        errors = [
            np.abs(a - b).max() / max(np.abs(a).max(), floor) for a, b in zip(theirs, ours, strict=True)
        ]
        print(f"gradients: largest relative difference {max(errors):.1e}")
        assert max(errors) <= of_gradients


@pytest.mark.parametrize("kernel, width", [(GELU, 1), (GatedGELU, 2)])
def test_a_gelu_in_float16_squares_nothing_into_infinity(kernel, width):
    """The first Ascend 910 takes any infinite value on the way for an overflow. Beyond 16 the
    gradient is that of a straight line.
    """
    x = np.array([[-1000.0, -300, -20, -3, 0, 3, 20, 300, 1000]], np.float16)
    given = ms.Tensor(np.concatenate([np.ones_like(x)] * (width - 1) + [x], 1))
    cell = kernel()

    def total(x):
        return cell(x)[0].sum()

    gradient = ms.grad(total)(given).asnumpy()[:, -x.shape[1] :]
    assert np.isfinite(gradient).all()
    assert np.array_equal(gradient[0, [0, 1, 2]], [0, 0, 0]) and np.array_equal(gradient[0, 6:], [1, 1, 1])


def test_the_normal_density_in_float16(monkeypatch):
    """Whatever goes into the exponential is finite, too."""
    x = np.array([-60000.0, -300, -3, -1, 0, 1, 4, 300, 60000], np.float16)
    squares = []
    exp = ops.exp
    monkeypatch.setattr(kernels.ops, "exp", lambda y: squares.append(y.asnumpy()) or exp(y))
    ours = normal_density(ms.Tensor(x))
    exact = np.exp(-(x.astype(np.float64) ** 2) / 2) / np.sqrt(2 * np.pi)
    assert ours.dtype == ms.float16 and np.isfinite(squares).all()
    assert np.abs(ours.asnumpy() - exact).max() <= 2**-12  # half a step of float16 below 0.5
