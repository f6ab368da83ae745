"""The 3x3 convolution on MindSpore's CPU back end, whose own is slow or leaks; see also `kernels`."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.operations.array_ops import Col2Im, Im2Col

from ldm.networks.kernels import RowSum


def pad_zeros(x, axis, before, after):
    """(B, C, H, W) with zeros before and after along axis 2 or 3."""
    # Concat: with Pad in its place the VAE decodes 512x512 in 18 s instead of 10.
    parts = (x,)
    if before:
        parts = (ops.zeros(x.shape[:axis] + (before,) + x.shape[axis + 1 :], x.dtype),) + parts
    if after:
        parts = parts + (ops.zeros(x.shape[:axis] + (after,) + x.shape[axis + 1 :], x.dtype),)
    return ops.cat(parts, axis)


def is_small(weight) -> bool:
    """Whether a copy of the weight for each sample costs less than a product for each sample."""
    return 4 * weight.size <= 1 << 20


class MatmulConv(nn.Cell):
    """Convolution of (B, C, H, W) by a 3x3 weight, as matrix products on the unfolded input (im2col).

    (2, 320, 64, 64): 50 / 155. With AVX-512 oneDNN runs this convolution and its input gradient on a
    reference kernel: 12,000; capped to AVX2 it takes 68 / 202, and matrix products are slower too. Its
    gradient of the weight keeps a scratch pad of up to the unfolded input and two weights for each
    convolution, and never frees it: over 10 GB for SD2's UNet. Only the input is kept here for the backward
    pass, not its nine copies.

    Args:
        channels: output channels. padding: of all four sides.
        columns_bytes: the forward pass unfolds the input in bands of rows that take about this at most.
    """

    def __init__(self, channels: int, stride: int, padding: int, columns_bytes: int = 256 << 20) -> None:
        super().__init__()
        self.channels, self.stride, self.padding, self.columns_bytes = (
            channels,
            stride,
            padding,
            columns_bytes,
        )
        self.unfold_band = Im2Col(ksizes=(3, 3), strides=stride, dilations=1, pads=(0, padding))
        self.unfold_padded = Im2Col(ksizes=(3, 3), strides=stride, dilations=1, pads=padding)
        self.fold = Col2Im(
            kernel_size=(3, 3), dilation=(1, 1), padding=(padding, padding), stride=(stride, stride)
        )
        self.matmul, self.matmul_a, self.matmul_b = (
            ops.MatMul(),
            ops.MatMul(transpose_a=True),
            ops.MatMul(transpose_b=True),
        )
        self.batched, self.batched_a, self.batched_b = (
            ops.BatchMatMul(),
            ops.BatchMatMul(True),
            ops.BatchMatMul(False, True),
        )
        self.join, self.join_rows = ops.Concat(0), ops.Concat(2)
        self.row_sum = RowSum()

    def by_sample(self, weight, batch, places):
        """Whether a copy of the weight for each sample, which BatchMatMul needs, costs more than cutting the
        batch into samples.
        """
        channels = weight.shape[1] // 9
        is_dear = weight.size > places * (channels + self.channels) and not is_small(weight)
        return batch == 1 or is_dear

    def for_each(self, weight, batch):
        return ops.broadcast_to(weight.reshape((1,) + weight.shape), (batch,) + weight.shape)

    def times_unfolded(self, weight, x, unfold):
        """(C_out, 9 C) times the unfolded x: (B, C_out, places)."""
        batch = x.shape[0]
        if not self.by_sample(weight, batch, x.shape[2] * x.shape[3] // self.stride**2):
            return self.batched(self.for_each(weight, batch), unfold(x).reshape(batch, weight.shape[1], -1))
        outputs = ()
        for part in ops.Split(0, batch)(x) if batch > 1 else (x,):
            y = self.matmul(weight, unfold(part).reshape(weight.shape[1], -1))
            outputs = outputs + (y.reshape(1, self.channels, -1),)
        return self.join(outputs) if batch > 1 else outputs[0]

    def construct(self, x, weight):
        batch, channels, height, width = x.shape
        flat = weight.reshape(self.channels, -1)
        out_height = (height + 2 * self.padding - 3) // self.stride + 1
        out_width = (width + 2 * self.padding - 3) // self.stride + 1
        bands = 1
        while (
            36 * batch * channels * out_height * out_width > bands * self.columns_bytes
            and out_height % (2 * bands) == 0
        ):
            bands = 2 * bands
        if bands == 1:
            y = self.times_unfolded(flat, x, self.unfold_padded)
            return y.reshape(batch, self.channels, out_height, out_width)
        x = pad_zeros(x, 2, self.padding, self.padding)
        rows = out_height // bands
        outputs = ()
        for i in range(bands):
            start = i * rows * self.stride
            if outputs:  # one band after the other: MindSpore would unfold them all at first
                x = ops.depend(x, outputs[-1])
            band = x[:, :, start : start + (rows - 1) * self.stride + 3]
            y = self.times_unfolded(flat, band, self.unfold_band)
            outputs = outputs + (y.reshape(batch, self.channels, rows, out_width),)
        return self.join_rows(outputs)

    def bprop(self, x, weight, out, dout):
        batch, channels, height, width = x.shape
        # MindSpore copies a parameter to reshape it, and unfolds the input: without the dependence on dout it
        # would keep what the forward pass made of both until here instead of making it again
        x, flat = ops.depend(x, dout), ops.depend(weight, dout).reshape(self.channels, -1)
        dout = dout.reshape(batch, self.channels, -1)
        size = Tensor([height, width], ms.int32)
        if not self.by_sample(flat, batch, dout.shape[2]):
            columns = self.unfold_padded(x).reshape(batch, 9 * channels, -1)
            d_weight = self.row_sum(self.batched_b(dout, columns).reshape(batch, -1))
            d_columns = self.batched_a(self.for_each(flat, batch), dout)
            return self.fold(d_columns.reshape(batch, channels, 9, -1), size), d_weight.reshape(weight.shape)
        d_x, d_weight = (), 0.0
        for x_i, dout_i in zip(ops.Split(0, batch)(x), ops.Split(0, batch)(dout)):
            dout_i = dout_i.reshape(self.channels, -1)
            d_weight = d_weight + self.matmul_b(dout_i, self.unfold_padded(x_i).reshape(9 * channels, -1))
            d_x = d_x + (self.fold(self.matmul_a(flat, dout_i).reshape(1, channels, 9, -1), size),)
        return self.join(d_x), d_weight.reshape(weight.shape)


class UpsampledConv(nn.Cell):
    """Nearest up-sampling of (B, C, H, W) to twice the size, then a 3x3 convolution: (B, channels, 2H, 2W).

    Of three neighbours in the large map at least two are the same pixel of the small one. So each of the four
    outputs of a pixel is a 2x2 convolution of the small map, whose weights are sums of the given ones
    (sub-pixel convolution, Shi et al. 2016): 4/9 of the multiplications, and 4 instead of 36 values of
    columns a pixel. (1, 256, 256, 256): 500, against 1263.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        # window u of the small map (rows u - 1 and u) makes rows 2u - 1 and 2u of the large one
        # (row of the window, row of the weight)
        first, second = (
            np.array([[1, 1, 0], [0, 0, 1]]),
            np.array([[1, 0, 0], [0, 1, 1]]),
        )
        self.sums = [
            Tensor(np.einsum("ay,bx->yxab", rows, columns).reshape(9, 4).astype(np.float32))
            for rows in (first, second) for columns in (first, second)
        ]  # fmt: skip
        self.unfold = Im2Col(ksizes=(2, 2), strides=1, dilations=1, pads=1)
        self.fold = Col2Im(kernel_size=(2, 2), dilation=(1, 1), padding=(1, 1), stride=(2, 2))
        self.matmul = ops.MatMul()

    def construct(self, x, weight):
        batch, channels, height, width = x.shape
        weight, weights = weight.reshape(self.channels * channels, 9), ()
        for sums in self.sums:
            weights = weights + (self.matmul(weight, sums).reshape(self.channels, 1, 4 * channels),)
        weight, outputs = ops.cat(weights, 1).reshape(4 * self.channels, 4 * channels), ()
        for sample in ops.Split(0, batch)(x):
            y = self.matmul(weight, self.unfold(sample).reshape(4 * channels, -1))
            outputs = outputs + (
                self.fold(y.reshape(1, self.channels, 4, -1), Tensor([2 * height, 2 * width], ms.int32)),
            )
        return ops.cat(outputs, 0)
