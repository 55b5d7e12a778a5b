"""What a low-bit linear layer computes, in plain torch operations on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from amct_pytorch.formats import IntFormat, NumberFormat

if TYPE_CHECKING:
    from amct_pytorch.low_bit.deploy_linear import LowBitLinear

# Sums of integers up to this are exact in float32, whatever their order.
EXACT_IN_FLOAT32 = 2**24
# With fewer columns to a product in float32, one in float64 is faster.
FEWEST_COLUMNS = 64


def reference_linear(layer: LowBitLinear, x: Tensor) -> Tensor:
    """y = Q_x(x / divisor) · Wᵀ + bias, computed in float32; y has the dtype of x.

    Where inputs and weights are integers with one scale per token and per channel, their
    products are summed exactly, an integer bias is added, and the sum takes both scales.
    """
    steps = divided(layer, x)
    inputs = layer.input_quantizer()
    if inputs is None:
        y = linear(steps, layer.quantized_weight().dequantize())
    elif not layer.spec.sums_integers:
        y = linear(inputs.simulate(steps), layer.quantized_weight().dequantize())
    else:
        scale, offset = inputs.scales(steps)
        integers = inputs.fmt.round((steps / scale).round_().add_(0 if offset is None else offset))
        if offset is not None:
            integers = integers - offset
        weight = layer.codes().float()
        if layer.offset is not None:
            weight = weight - layer.offset
        largest = _largest(inputs.fmt, offset is None)
        largest *= _largest(layer.spec.weight.format, layer.offset is None)
        return scaled_sums(layer, exact_linear(integers, weight, largest), scale, x.dtype)
    return with_bias(layer, y).to(x.dtype)


def exact_linear(x: Tensor, weight: Tensor, largest: int) -> Tensor:
    """x · weightᵀ of integers, exact: columns go in parts whose sums float32 holds.

    Integers of 8 bits and their differences are exact in what devices may compute with in the
    place of float32 (bfloat16, TF32), but sums are not exact in what autocast would choose.

    Args:
        x: integers in float32, [..., K].
        weight: integers in float32, [N, K].
        largest: that no product of two of them exceeds.

    Returns:
        [..., N]; float32 if that holds every sum, else float64.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Not by `without_autocast`, which torch.compile cannot trace.
        with torch.autocast(device, enabled=False):
            return exact_linear(x, weight, largest)
    columns, size = EXACT_IN_FLOAT32 // largest, x.shape[-1]
    if size <= columns:
        return linear(x, weight)
    if columns < FEWEST_COLUMNS:
        return linear(x.double(), weight.double())
    parts = zip(x.split(columns, -1), weight.split(columns, -1), strict=True)
    first, *others = (linear(*part) for part in parts)
    sums = first.double()
    for part in others:
        sums += part
    return sums


def _largest(fmt: NumberFormat, symmetric: bool) -> int:
    """Of the magnitudes of codes less their offset."""
    assert isinstance(fmt, IntFormat)
    return -fmt.qmin if symmetric else fmt.qmax - fmt.qmin


def divided(layer: LowBitLinear, x: Tensor) -> Tensor:
    """The input in units of the divisor, float32."""
    (divisor,) = buffers(layer, "divisor")
    return x.float() if divisor is None else x.float() / divisor


def scaled_sums(
    layer: LowBitLinear, sums: Tensor, scale: Tensor | float, dtype: torch.dtype
) -> Tensor:
    """Real outputs from sums of integer products.

    Args:
        layer: the layer; its weights have one scale for each channel, or one.
        sums: integers of any dtype that holds them exactly, [..., N], changed.
        scale: of the inputs, [1] or [..., 1], or a float32 number.
        dtype: of the result.
    """
    bias, weight_scale = buffers(layer, "bias", "scale")
    if bias is not None and not bias.is_floating_point():
        # float32 does not hold every int32.
        sums = (sums.double() if sums.dtype == torch.float32 else sums).add_(bias)
    y = sums.float().mul_(scale).mul_(weight_scale.view(-1))
    return with_bias(layer, y).to(dtype)


def with_bias(layer: LowBitLinear, y: Tensor) -> Tensor:
    """`y` plus the bias, where that is a floating one."""
    (bias,) = buffers(layer, "bias")
    return y if bias is None or not bias.is_floating_point() else y + bias


def buffers(layer: LowBitLinear, *names: str) -> list[Any]:
    """Buffers by their names: `nn.Module` finds one as slowly as torch adds two short rows."""
    held = layer._buffers
    return [held[name] for name in names]
