"""--recompute: the same numbers, from less memory.

Run as a program, this file is the process whose memory is measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def gradients(recompute: bool) -> list[np.ndarray]:
    """Loss and gradients of four transformers on maps (4, 256, 32, 32) of 4 MB."""
    from ldm.device import start_device

    start_device("CPU", 0)
    from mindspore import ParameterTuple, Tensor, nn, ops

    from ldm.config import UNetConfig
    from ldm.networks.attention import SpatialTransformer
    from ldm.networks.layer_set import layers_of_this_device

    layers = layers_of_this_device()
    config = UNetConfig(4, 4, 256, (1,), 1, (1,), head_channels=64, context_dim=48)

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.transformers = nn.CellList([SpatialTransformer(256, config, layers) for _ in range(4)])

        def construct(self, x, context):
            for transformer in self.transformers:
                x = transformer(x, x, context, None)
            return ops.square(x).mean()

    class Gradients(nn.Cell):
        def __init__(self, net, weights):
            super().__init__(auto_prefix=False)
            self.net, self.weights = net, weights
            self.value_and_grad = ops.value_and_grad(net, 0, weights)

        def construct(self, x, context):
            loss, (dx, d_weights) = self.value_and_grad(x, context)
            return (loss, dx) + d_weights

    net, rng = Net().set_train(True), np.random.default_rng(0)
    for parameter in net.trainable_params():
        parameter.set_data(Tensor(rng.normal(size=parameter.shape).astype(np.float32) * 0.05))
    if recompute:
        for transformer in net.transformers:
            transformer.transformer_blocks[0].recompute_feed_forward()
    x = Tensor(rng.normal(size=(4, 256, 32, 32)).astype(np.float32))
    context = Tensor(rng.normal(size=(4, 77, 48)).astype(np.float32))
    return [result.asnumpy() for result in Gradients(net, ParameterTuple(net.trainable_params()))(x, context)]


@pytest.fixture(scope="module")
def runs():
    """For both settings: some of each result's values, and the peak resident memory of the process in MB."""
    runs = {}
    for recompute in (False, True):
        command = [sys.executable, __file__, str(recompute)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        runs[recompute] = json.loads(done.stdout.splitlines()[-1])
    return runs


def test_gradients_are_the_same(runs):
    for plain, recomputed in zip(runs[False]["values"], runs[True]["values"], strict=True):
        # the same sums in another order
        np.testing.assert_allclose(recomputed, plain, rtol=1e-5, atol=1e-6 * np.abs(plain).max())


def test_less_memory_is_taken(runs):
    """A transformer keeps 33 maps, or 16: in all 272 MB less.

    Half of that is asked for, since other memory varies.
    """
    assert runs[False]["peak"] - runs[True]["peak"] > 136


if __name__ == "__main__":
    values = [
        result.ravel()[:: max(1, result.size // 50)].tolist() for result in gradients(sys.argv[1] == "True")
    ]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # ru_maxrss knows the parent's peak too
    print(json.dumps({"values": values, "peak": int(status["VmHWM"].split()[0]) / 1024}))
