"""This project's own operators of a CPU, against PyTorch's functions and their gradients."""

import ctypes
import functools
import logging
import os
import platform
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHALLOW, random_model, relative_error, weights_as_arrays
from network_outputs import inputs, outputs

from ldm import operators
from ldm.networks import layers_native as native
from ldm.networks.latent_diffusion import build_model
from ldm.networks.layer_set import LayerSet, layers_of_this_device


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(count, causal):
    def of_torch(q, k, v):
        parts = (heads(x, count) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts, is_causal=causal).transpose(1, 2).flatten(2)

    return of_torch


around = functools.partial(F.conv2d, padding=1)


def upsampled(x, w, b):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, padding=1)


def padded(x, w, b):
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), w, b, stride=2)


def gated(x):
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def sum_of_squares(*arrays):
    return sum((x.double() ** 2).sum() for x in arrays).float().reshape(1)


# Sizes that no register, panel, tile or line of an image divides. `dense`: see DenseProduct.
CASES = {
    "dense": (native.ProductAndBias(False, False, False), F.linear, [(3, 41, 37), (53, 37), (53,)]),
    "dense_large": (native.Product(False, False, False), F.linear, [(700, 601), (530, 601)]),
    "places_to_tokens": (
        native.ProductAndBias(True, False, False), lambda x, w, b: F.linear(x.mT, w, b),
        [(3, 37, 41), (53, 37), (53,)],
    ),
    "tokens_to_places": (
        native.ProductAndBias(False, True, False), lambda x, w, b: F.linear(x, w, b).mT,
        [(3, 41, 37), (53, 37), (53,)],
    ),
    "pointwise": (
        native.ProductAndBias(True, True, False), F.conv2d, [(3, 37, 5, 9), (53, 37, 1, 1), (53,)]
    ),
    "convolution": (
        native.ConvolutionAndBias(1, (1, 1, 1, 1), False), around,
        [(3, 19, 7, 13), (29, 19, 3, 3), (29,)],
    ),
    "convolution_of_runs": (
        native.ConvolutionAndBias(1, (1, 1, 1, 1), False), around,
        [(2, 40, 8, 64), (530, 40, 3, 3), (530,)],
    ),
    "convolution_of_short_runs": (
        native.Convolution(1, (1, 1, 1, 1), False), around,
        [(9, 40, 4, 4), (30, 40, 3, 3)],
    ),
    "convolution_from_few_channels": (
        native.ConvolutionAndBias(1, (1, 1, 1, 1), False), around,
        [(2, 4, 9, 11), (29, 4, 3, 3), (29,)],
    ),
    "convolution_to_few_channels": (
        native.ConvolutionAndBias(1, (1, 1, 1, 1), False), around,
        [(2, 29, 11, 8), (3, 29, 3, 3), (3,)],
    ),
    "convolution_without_zeros_around": (
        native.Convolution(1, (0, 0, 0, 0), False), F.conv2d, [(2, 19, 70, 9), (29, 19, 3, 3)],
    ),
    "convolution_in_bands": (
        native.Convolution(1, (1, 1, 1, 1), False), around,
        [(1, 200, 53, 53), (200, 200, 3, 3)],
    ),
    "strided": (
        native.Convolution(2, (1, 1, 1, 1), False), lambda x, w: F.conv2d(x, w, stride=2, padding=1),
        [(3, 19, 9, 14), (29, 19, 3, 3)],
    ),
    "padded_on_two_sides": (
        native.ConvolutionAndBias(2, (0, 1, 0, 1), False), padded, [(2, 5, 8, 12), (7, 5, 3, 3), (7,)]
    ),
    "upsampled": (native.UpsampledConvolution(False), upsampled, [(2, 19, 5, 7), (29, 19, 3, 3), (29,)]),
    "attention": (
        native.Attention(3), attention(3, False), [(2, 131, 57), (2, 2100, 57), (2, 2100, 57)]
    ),
    "attention_of_one_head": (
        native.Attention(1), attention(1, False), [(1, 300, 310), (1, 70, 310), (1, 70, 310)]
    ),
    "causal_attention": (native.Attention(2, causal=True), attention(2, True), [(2, 77, 48)] * 3),
    "group_norm": (
        native.Norm("GroupNorm", 4, False, 1e-5),
        lambda x, gamma, beta: F.group_norm(x, 4, gamma, beta, 1e-5), [(3, 20, 5, 7), (20,), (20,)],
    ),
    "group_norm_silu": (
        native.Norm("GroupNorm", 4, True, 1e-6),
        lambda x, gamma, beta: F.silu(F.group_norm(x, 4, gamma, beta, 1e-6)), [(3, 20, 9, 9), (20,), (20,)],
    ),
    "layer_norm": (
        native.Norm("LayerNorm", 1e-5), lambda x, gamma, beta: F.layer_norm(x, (50,), gamma, beta, 1e-5),
        [(3, 131, 50), (50,), (50,)],
    ),
    "gelu": (native.GELU(), F.gelu, [(3, 41, 401)]),
    "gated_gelu": (native.GatedGELU(), gated, [(3, 41, 90)]),
}  # fmt: skip


def given(shapes, scale=1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_operators_and_their_gradients_are_those_of_pytorch(name):
    """In float64; float32 sums of a few thousand products differ by a few 1e-7 of the largest."""
    cell, reference, shapes = CASES[name]
    arrays = given(shapes)
    theirs = [torch.from_numpy(array).double().requires_grad_() for array in arrays]
    expected = reference(*theirs)
    weight = np.random.default_rng(6).standard_normal(expected.shape).astype(np.float32)
    expected_gradients = torch.autograd.grad(expected, theirs, torch.from_numpy(weight).double())
    weight = ms.Tensor(weight)

    def weighted_sum(*arrays):
        return (cell(*arrays) * weight).sum()

    derive = ms.value_and_grad(weighted_sum, tuple(range(len(arrays))))
    found, gradients = derive(*map(ms.Tensor, arrays))
    errors = [relative_error(cell(*map(ms.Tensor, arrays)).asnumpy(), expected)]
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    errors += [relative_error(ours.asnumpy(), those) for ours, those in zip(gradients, expected_gradients)]
    print([f"{error:.1e}" for error in errors])
    assert np.isfinite(found.asnumpy()) and max(errors) < 3e-6


def test_activations_are_right_where_they_are_small_and_large():
    x = np.concatenate([np.linspace(-14, 14, 20001), [-1e4, -90, 90, 1e4, 0]]).astype(np.float32)
    expected = F.gelu(torch.from_numpy(x).double()).numpy()
    assert np.abs(native.GELU()(ms.Tensor(x)).asnumpy() - expected).max() <= 1e-6 * np.abs(x).max() / 100
    few = np.abs(x) < 15
    assert np.abs(native.GELU()(ms.Tensor(x[few])).asnumpy() - expected[few]).max() < 5e-6


def test_a_sum_of_squares_of_many_arrays():
    arrays = given([(3,), (40000,), (7, 9), (1,)])
    total = operators.operator("SquareSum", lambda *_: [1])(*map(ms.Tensor, arrays)).asnumpy()
    assert np.allclose(total, sum_of_squares(*map(torch.from_numpy, arrays)), rtol=1e-6)


@pytest.mark.skipif(not operators.has_bfloat16(), reason="of a processor with AVX512-BF16")
@pytest.mark.parametrize("name, cell", [
    ("dense", native.ProductAndBias(False, False, True)),
    ("dense_large", native.Product(False, False, True)),
    ("strided", native.Convolution(2, (1, 1, 1, 1), True)),
    ("attention", native.Attention(3, dtype=ms.bfloat16)),
])  # fmt: skip
def test_products_of_bfloat16(name, cell):
    """Factors rounded as PyTorch rounds them; the attention rounds its probabilities, too."""
    _, reference, shapes = CASES[name]
    arrays = given(shapes, 0.5)
    rounded = [torch.from_numpy(array).bfloat16().double() for array in arrays[:2]]
    rest = [torch.from_numpy(array).double() for array in arrays[2:]]
    error = relative_error(cell(*map(ms.Tensor, arrays)).asnumpy(), reference(*rounded, *rest))
    assert error < (1e-2 if name == "attention" else 1e-6)


@pytest.mark.skipif(not operators.has_bfloat16(), reason="of a processor with AVX512-BF16")
def test_networks_in_bfloat16_are_those_in_float32_to_a_hundredth():
    model, arrays = random_model(SHALLOW), inputs(SHALLOW, 2)
    half = build_model(SHALLOW, initialise=True, layers=LayerSet(native, ms.bfloat16))
    weights = weights_as_arrays(model)
    for parameter in half.get_parameters():
        parameter.set_data(ms.Tensor(weights[parameter.name]))
    expected, found = outputs(model, *arrays), outputs(half, *arrays)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert 1e-4 < max(errors.values()) < 2e-2  # float32 would be below, a mistake above


def test_answers_of_float16_are_rounded_as_numpy_rounds():
    """By the unit matrix, which changes nothing else: ties, numbers less than normal, and those beyond."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 64)) * 2.0 ** rng.integers(-28, 20, (64, 64))).astype(np.float32)
    x[0, :8] = 1 + 2**-11, 1 + 3 * 2**-11, -(2**-25), 3 * 2**-25, 65519, 65520, -1e30, 0
    unit = ms.Tensor(np.eye(64, dtype=np.float32))
    ours = native.Product(False, False, 2)(ms.Tensor(x), unit).asnumpy()
    assert np.array_equal(ours, x.astype(np.float16)) and np.isinf(ours[0, 5:7]).all()
    x[0, 0], x[1, 1] = np.nan, np.inf
    ours = native.Product(False, False, 2)(ms.Tensor(x), unit).asnumpy()
    assert np.isnan(ours[0]).all() and np.isinf(ours[1, 1]) and np.isfinite(ours[3]).any()


@pytest.mark.parametrize("name, cell", [
    ("dense", native.ProductAndBias(False, False, 2)), ("strided", native.Convolution(2, (1, 1, 1, 1), 2)),
    ("attention", native.Attention(3, dtype=ms.float16)),
])  # fmt: skip
def test_products_of_float16(name, cell):
    """Sums in float32, answers rounded once, by half of 2^-10 at the most; an attention's scores, too."""
    _, reference, shapes = CASES[name]
    arrays = given(shapes, 0.5)
    found = cell(*map(ms.Tensor, arrays)).asnumpy()
    error = relative_error(found, reference(*(torch.from_numpy(array).double() for array in arrays)))
    assert np.array_equal(found, found.astype(np.float16))
    assert 1e-5 < error < (2e-3 if name == "attention" else 2**-11)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Operators that have not been looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(operators, "library", operators.library.__wrapped__)
    return tmp_path / "dreambooth-mindspore"


def test_operators_are_compiled_once(fresh, monkeypatch):
    made = operators.library()
    assert made.parent == fresh and [entry.name for entry in fresh.iterdir()] == [made.name]
    monkeypatch.setattr(operators.subprocess, "run", None)
    assert operators.library() == made
    assert ctypes.CDLL(str(made)).has_bfloat16() == operators.has_bfloat16()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names its first level")
def test_operators_of_older_processors(tmp_path):
    """Vectors of 4 values, as on ARM: the comparison with PyTorch, in a process of its own."""
    program = tmp_path / "c++"
    program.write_text(f'#!/bin/sh\nexec {operators.compiler()} "$@" -march=x86-64\n')
    program.chmod(0o755)
    given = os.environ | {"CXX": str(program), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "pytorch"]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and f"{len(CASES)} passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("program, says", [
    ("", ""), ("false", "cannot be compiled (Command"), ("no such program", "No such file"),
])  # fmt: skip
def test_without_a_compiler_the_layers_are_mindspores(fresh, monkeypatch, caplog, program, says):
    from ldm.networks import layer_set, layers_cpu

    monkeypatch.setattr(operators, "compiler", lambda: program or None)
    monkeypatch.setattr(layer_set, "library", operators.library)
    with caplog.at_level(logging.WARNING):
        layers = layers_of_this_device()
    assert layers.Dense.func is layers_cpu.Dense and says in caplog.text
    assert not operators.has_bfloat16()


def test_operators_of_one_name_are_told_apart_by_their_kind():
    """MindSpore keeps the shapes that it found for an operator's name and inputs."""

    class All(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.plain = native.Conv2d(8, 8, 3, padding=1)
            self.strided, self.dense = native.Conv2d(8, 8, 3, stride=2, padding=1), native.Dense(8, 8)
            self.to_places = native.TokensToPlaces(8, 8)

        def construct(self, x):
            small = self.strided(x)
            tokens = small.reshape(1, 8, 8)  # as many channels as places
            return self.plain(x), small, self.dense(tokens), self.to_places(tokens, 2, 4)

    shapes = [answer.shape for answer in All()(ms.Tensor(np.ones((1, 8, 4, 8), np.float32)))]
    assert shapes == [(1, 8, 4, 8), (1, 8, 2, 4), (1, 8, 8), (1, 8, 2, 4)]
