"""Convolutions without constant weights, pooling, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from amct_pytorch.importing.registry import Operator, operator
from amct_pytorch.importing.values import Value, integers

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def window_pads(
    op: Operator, sizes: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The padding before and behind each spatial axis.

    Args:
        op: with ``pads`` or ``auto_pad``, ``strides`` and ``dilations``.
        sizes: of the input's spatial axes.
        kernel: of the window.
    """
    number = len(kernel)
    automatic = op.get("auto_pad", "NOTSET")
    if automatic in ("NOTSET", ""):
        pads = list(op.get("pads", [0] * 2 * number))
        return pads[:number], pads[number:]
    if automatic == "VALID":
        return [0] * number, [0] * number
    strides = op.get("strides", [1] * number)
    dilations = op.get("dilations", [1] * number)
    begin, end = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (width - 1) * dilation + 1
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        less = total // 2
        begin.append(less if automatic == "SAME_UPPER" else total - less)
        end.append(total - begin[-1])
    return begin, end


def padded(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with its last axes padded."""
    if not any(begin) and not any(end):
        return x
    flat = [n for pair in zip(begin[::-1], end[::-1], strict=True) for n in pair]
    return F.pad(x, flat, value=value)


@operator("Conv")
def _conv(op: Operator, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    number = x.dim() - 2
    begin, end = window_pads(op, x.shape[2:], weight.shape[2:])
    return _CONVOLUTIONS[number - 1](
        padded(x, begin, end),
        weight,
        bias,
        op.get("strides", [1] * number),
        0,
        op.get("dilations", [1] * number),
        op.get("group", 1),
    )


@operator("ConvTranspose")
def _conv_transpose(op: Operator, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    number = x.dim() - 2
    if op.get("output_shape") is not None or op.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        raise NotImplementedError("output_shape and auto_pad of ConvTranspose")
    pads = op.get("pads", [0] * 2 * number)
    y = _TRANSPOSED[number - 1](
        x,
        weight,
        bias,
        op.get("strides", [1] * number),
        0,
        op.get("output_padding", [0] * number),
        op.get("group", 1),
        op.get("dilations", [1] * number),
    )
    return cropped(y, pads)


def cropped(y: Tensor, pads: Sequence[int]) -> Tensor:
    """What a transposed convolution leaves of its result: all but the padding."""
    number = len(pads) // 2
    for i in range(number):
        begin, end = pads[i], pads[number + i]
        if begin or end:
            y = y.narrow(2 + i, begin, y.shape[2 + i] - begin - end)
    return y


@operator("MaxPool")
def _max_pool(op: Operator, x: Tensor) -> Tensor:
    if op.outputs > 1:
        raise NotImplementedError("the second output of MaxPool")
    kernel = op.get("kernel_shape")
    number = len(kernel)
    begin, end = window_pads(op, x.shape[2:], kernel)
    strides, dilations = op.get("strides", [1] * number), op.get("dilations", [1] * number)
    padding = begin
    if begin != end or any(2 * pad > width for pad, width in zip(begin, kernel, strict=True)):
        lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        x, padding = padded(x, begin, end, lowest), [0] * number
    return _MAX_POOLS[number - 1](
        x, kernel, strides, padding, dilations, bool(op.get("ceil_mode", 0))
    )


@operator("AveragePool")
def _average_pool(op: Operator, x: Tensor) -> Tensor:
    kernel = op.get("kernel_shape")
    number = len(kernel)
    begin, end = window_pads(op, x.shape[2:], kernel)
    pool = _AVERAGE_POOLS[number - 1]
    strides = op.get("strides", [1] * number)
    if any(d != 1 for d in op.get("dilations", [1])):
        raise NotImplementedError("dilations of AveragePool")
    ceil_mode, counted = bool(op.get("ceil_mode", 0)), bool(op.get("count_include_pad", 0))
    if begin == end and all(2 * pad <= width for pad, width in zip(begin, kernel, strict=True)):
        return pool(x, kernel, strides, begin, ceil_mode, counted)
    y = pool(padded(x, begin, end), kernel, strides, 0, ceil_mode)
    if counted:
        return y
    share = pool(padded(torch.ones_like(x[:1, :1]), begin, end), kernel, strides, 0, ceil_mode)
    return y / share


@operator("GlobalAveragePool")
def _global_average_pool(_: Operator, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(_: Operator, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


_RESIZES: dict[tuple[Any, ...], dict[str, Any]] = {
    ("nearest", "asymmetric", "floor"): {"mode": "nearest"},
    ("nearest", "half_pixel", "round_prefer_floor"): {"mode": "nearest-exact"},
    ("nearest", "half_pixel", "round_prefer_ceil"): {"mode": "nearest-exact"},
    ("linear", "half_pixel"): {"mode": "linear", "align_corners": False},
    ("linear", "pytorch_half_pixel"): {"mode": "linear", "align_corners": False},
    ("linear", "align_corners"): {"mode": "linear", "align_corners": True},
    ("cubic", "half_pixel", -0.75): {"mode": "bicubic", "align_corners": False},
    ("cubic", "pytorch_half_pixel", -0.75): {"mode": "bicubic", "align_corners": False},
    ("cubic", "align_corners", -0.75): {"mode": "bicubic", "align_corners": True},
}


@operator("Resize", host_inputs=(1, 2, 3))
def _resize(
    op: Operator, x: Tensor, roi: Value = None, scales: Value = None, sizes: Value = None
) -> Tensor:
    mode = op.get("mode", "nearest")
    coordinates = op.get("coordinate_transformation_mode", "half_pixel")
    key: tuple[Any, ...] = (mode, coordinates)
    if mode == "nearest":
        key = (*key, op.get("nearest_mode", "round_prefer_floor"))
    if mode == "cubic":
        key = (*key, op.get("cubic_coeff_a", -0.75))
    policy = op.get("keep_aspect_ratio_policy", "stretch")
    other = op.get("antialias", 0) or op.get("exclude_outside", 0) or op.get("axes") is not None
    if key not in _RESIZES or other or policy != "stretch":
        raise NotImplementedError(f"Resize with {', '.join(map(str, key))}")
    number = x.dim() - 2
    arguments: dict[str, Any] = dict(_RESIZES[key])
    if arguments["mode"] == "linear":
        arguments["mode"] = ("linear", "bilinear", "trilinear")[number - 1]
    if sizes is not None and integers(sizes):
        return F.interpolate(x, size=integers(sizes)[-number:], **arguments)
    assert scales is not None
    factors = [float(factor) for factor in integers(scales)]
    if any(factor != 1 for factor in factors[:-number]):
        raise NotImplementedError("Resize of the batch or channel axis")
    return F.interpolate(x, scale_factor=factors[-number:], **arguments)


@operator("Upsample", host_inputs=(1,))
def _upsample(op: Operator, x: Tensor, scales: Value = None) -> Tensor:
    factors = op.get("scales") if scales is None else integers(scales)
    number = x.dim() - 2
    mode = {"nearest": "nearest"}.get(op.get("mode", "nearest"))
    if mode is None:
        raise NotImplementedError("Upsample with linear mode")
    return F.interpolate(x, scale_factor=[float(f) for f in factors[-number:]], mode=mode)
