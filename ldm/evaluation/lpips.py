"""LPIPS, a perceptual distance of two images (Zhang et al. 2018, arXiv 1801.03924, eq. 1), on AlexNet.

Weights: torchvision's alexnet-owt-7be5be79.pth, which the user has; those of the linear layers lie beside
this file (version 0.1 of the paper's own, see THIRD_PARTY_NOTICES.md).
"""

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from ldm.weights.checkpoint import fill
from ldm.weights.source import read_file

# place among torchvision's `features`, channels in and out, kernel, stride, padding; * a pooling before it
CONVOLUTIONS = (
    (0, 3, 64, 11, 4, 2, False), (3, 64, 192, 5, 1, 2, True), (6, 192, 384, 3, 1, 1, True),
    (8, 384, 256, 3, 1, 1, False), (10, 256, 256, 3, 1, 1, False),
)  # fmt: skip
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LEAST = 1e-10
LINEAR = Path(__file__).with_name("lpips_alex.npz")


class Lpips(nn.Cell):
    """Two batches of pixels (B, 3, H, W) in [-1, 1] to distances (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions, self.pools = nn.CellList(), []
        for _, before, after, kernel, stride, padding, pools in CONVOLUTIONS:
            self.convolutions.append(nn.Conv2d(before, after, kernel, stride, "pad", padding, has_bias=True))
            self.pools.append(pools)
        self.pool = nn.MaxPool2d(3, 2)
        self.weights = ms.ParameterTuple([
            Parameter(initializer("zeros", (1, after, 1, 1), ms.float32), name=f"lin{place}")
            for place, (_, _, after, *_) in enumerate(CONVOLUTIONS)
        ])  # fmt: skip
        self.shift = Tensor(np.reshape(np.float32(SHIFT), (1, 3, 1, 1)))
        self.scale = Tensor(np.reshape(np.float32(SCALE), (1, 3, 1, 1)))

    def features(self, pixels):
        x, found = (pixels - self.shift) / self.scale, ()
        for place in range(len(self.pools)):
            if self.pools[place]:
                x = self.pool(x)
            x = ops.relu(self.convolutions[place](x))
            found = found + (x / (ops.sqrt(ops.square(x).sum(1, keepdims=True)) + LEAST),)
        return found

    def construct(self, first, second):
        distance = 0.0
        ones, others = self.features(first), self.features(second)
        for place in range(len(self.pools)):
            difference = ops.square(ones[place] - others[place]) * self.weights[place]
            distance = distance + difference.sum(1).mean((1, 2))
        return distance


def load_lpips(alexnet: Path) -> Lpips:
    """With the convolutions of torchvision's file. Raises ValueError where it is another one."""
    network, features = Lpips(), read_file(alexnet)
    parameters, arrays = {}, {}
    for place, (number, *_) in enumerate(CONVOLUTIONS):
        convolution, linear = network.convolutions[place], network.weights[place]
        for name, its in (("weight", convolution.weight), ("bias", convolution.bias)):
            parameters[name := f"features.{number}.{name}"] = its
            if name not in features:
                raise ValueError(f"{alexnet}: no {name} in it; torchvision's AlexNet is wanted")
            arrays[name] = features[name]
        parameters[f"lin{place}"] = linear
    with np.load(LINEAR, allow_pickle=False) as file:
        arrays |= dict(file)
    fill(parameters, arrays, str(alexnet))
    return network.set_train(False)
