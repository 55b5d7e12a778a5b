"""A layer's call as a product of matrices: rows of inputs, times weights, is rows of outputs.

A row is one output position: the inputs that meet there, in the order of the weights. Grouped
layers are several such products, one for each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.wrapped import CompressedLayer


def choose_positions(y: Tensor, channel_axis: int, number: int, seed: int) -> Tensor:
    """At most so many output positions of `y`, int64, in order; the same for the same seed."""
    total = y.numel() // max(1, y.shape[channel_axis])
    if total <= number:
        return torch.arange(total)
    # One in each of `number` stretches: all items of the batch, and all places of an image.
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(number + 1) * total // number
    within = torch.rand(number, generator=generator, dtype=torch.float64)
    return starts[:-1] + (within * starts.diff()).long()


def output_rows(y: Tensor, positions: Tensor, channel_axis: int) -> Tensor:
    """The output at these positions, [positions, channels]."""
    positions = positions.to(y.device)
    if channel_axis in (-1, y.dim() - 1):
        return y.reshape(-1, y.shape[-1])[positions]
    flat = y.flatten(2)
    places = flat.shape[2]
    return flat[positions // places, :, positions % places]


def input_rows(layer: CompressedLayer, call: LayerCall, x: Tensor, positions: Tensor) -> Tensor:
    """The inputs that meet at some output positions, [groups, positions, K].

    Args:
        layer: Linear, Conv2d or ConvTranspose2d.
        call: its call, for everything but the operands.
        x: its input.
        positions: as `choose_positions` gives them.
    """
    positions = positions.to(x.device)
    if layer.kind.channel_axis == -1:
        return x.reshape(-1, x.shape[-1])[positions][None]
    geometry = _Geometry.of(layer, call, x)
    height, width = geometry.output
    places = height * width
    item, place = positions // places, positions % places
    tap_y, inside_y = geometry.taps(0, place // width)
    tap_x, inside_x = geometry.taps(1, place % width)
    # [positions, channels, taps in y, taps in x]
    found = x[item[:, None, None], :, tap_y[:, :, None], tap_x[:, None, :]].permute(0, 3, 1, 2)
    found = found * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
    groups = layer.groups
    return found.reshape(len(positions), groups, -1).transpose(0, 1).contiguous()


def weight_matrices(layer: CompressedLayer, weight: Tensor) -> Tensor:
    """The weight in the order of `input_rows`, [groups, K, output channels of a group]."""
    if layer.kind.transposed:
        # [Cin, Cout / groups, ...]
        split = weight.reshape(layer.groups, -1, *weight.shape[1:])
        return split.transpose(1, 2).flatten(2).transpose(1, 2).contiguous()
    return weight.reshape(layer.groups, -1, weight[0].numel()).transpose(1, 2).contiguous()


def weight_from_matrices(layer: CompressedLayer, matrices: Tensor) -> Tensor:
    """The inverse of `weight_matrices`, in the shape of the layer's weight."""
    shape = layer.weight.shape
    if layer.kind.transposed:
        split = matrices.transpose(1, 2).reshape(
            layer.groups, shape[1], shape[0] // layer.groups, *shape[2:]
        )
        return split.transpose(1, 2).reshape(shape)
    return matrices.transpose(1, 2).reshape(shape)


class _Geometry:
    """Where the taps of a two-dimensional (transposed) convolution fall."""

    def __init__(
        self,
        sizes: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        before: tuple[int, int],
        dilation: tuple[int, int],
        output: tuple[int, int],
        *,
        transposed: bool,
    ) -> None:
        self.output = output
        self._sizes, self._kernel, self._stride = sizes, kernel, stride
        self._before, self._dilation, self._transposed = before, dilation, transposed

    @classmethod
    def of(cls, layer: CompressedLayer, call: LayerCall, x: Tensor) -> _Geometry:
        """Of a call on `x`."""
        transposed = layer.kind.transposed
        names = ["stride", "padding", "output_padding", "groups", "dilation"]
        if not transposed:
            names = ["stride", "padding", "dilation", "groups"]
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        stride, dilation = _pair(given.get("stride", 1)), _pair(given.get("dilation", 1))
        sizes = (x.shape[-2], x.shape[-1])
        kernel = (layer.weight.shape[-2], layer.weight.shape[-1])
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = given.get("padding", 0)
        if padding == "valid":
            padding = 0
        if padding == "same":
            before = (spans[0] // 2, spans[1] // 2)
            around = (spans[0], spans[1])
        else:
            before = _pair(padding)
            around = (2 * before[0], 2 * before[1])
        if transposed:
            extra = _pair(given.get("output_padding", 0))
            output = [
                (n - 1) * s - p + span + e + 1
                for n, s, p, span, e in zip(sizes, stride, around, spans, extra, strict=True)
            ]
        else:
            output = [
                (n + p - span - 1) // s + 1
                for n, p, span, s in zip(sizes, around, spans, stride, strict=True)
            ]
        return cls(
            sizes,
            kernel,
            stride,
            before,
            dilation,
            (output[0], output[1]),
            transposed=transposed,
        )

    def taps(self, axis: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """Input index of each tap and whether there is such an input, both [places, taps]."""
        reach = torch.arange(self._kernel[axis], device=place.device) * self._dilation[axis]
        stride, before, size = self._stride[axis], self._before[axis], self._sizes[axis]
        if self._transposed:
            shifted = place[:, None] + before - reach
            index = torch.div(shifted, stride, rounding_mode="floor")
            inside = (shifted % stride == 0) & (index >= 0) & (index < size)
        else:
            index = place[:, None] * stride - before + reach
            inside = (index >= 0) & (index < size)
        return index.clamp(0, size - 1), inside


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    assert isinstance(value, tuple | list)
    return (int(value[0]), int(value[-1]))


def row_values(layer: CompressedLayer) -> int:
    """Number of values in one row of inputs, over all groups."""
    weight = layer.weight
    if layer.kind.transposed:
        return weight.numel() // weight.shape[1]
    return weight[0].numel() * layer.groups
