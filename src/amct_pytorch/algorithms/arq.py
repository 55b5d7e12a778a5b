"""ARQ: weight scales from the symmetric range of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.formats.integer import SMALLEST_SCALE
from amct_pytorch.graph.weight_layout import WeightLayout


def arq_scale(
    weight: Tensor, number_format: IntFormat, layout: WeightLayout, *, channel_wise: bool
) -> Tensor:
    """One scale, or one per output channel, that spans the weights.

    s = max / (2^(b-1) - 1) where the largest weight is at least as far from zero as the
    smallest, else |min| / 2^(b-1). Where the weights are next to all zero (below 2^-23 per
    step), s is 2^-23: the definition's 1 would round them all to zero and leave the channel's
    bias no finer than the step of the input.

    Args:
        weight: the layer's weight.
        number_format: the integers to quantize to.
        layout: which weights belong to which output channel.
        channel_wise: one scale per output channel instead of one.

    Returns:
        float32 [out_channels] or [1].
    """
    rows = layout.rows(weight.detach().float())
    if not channel_wise:
        rows = rows.reshape(1, -1)
    low, high = rows.amin(1), rows.amax(1)
    scale, _ = number_format.factors(low, high, symmetric=True)
    largest = torch.maximum(high / number_format.qmax, low / number_format.qmin)
    return torch.where(largest < SMALLEST_SCALE, torch.full_like(scale, SMALLEST_SCALE), scale)


def bias_limit(scale: Tensor) -> int:
    """Largest |integer bias| for a layer with these weight (or bias) scales.

    With a scale per channel, 2^23 leaves the sums of most layers room below 2^24, where
    float32 is exact. A single scale for the whole layer cannot be widened for the sake of one
    large bias, so there the limit is what int32 holds with room for the sum.
    """
    return 2**23 if scale.numel() > 1 else 2**30


def floored_for_bias(scale_w: Tensor, scale_d: float, bias: Tensor, limit: int) -> Tensor:
    """Weight scales made so large that no integer bias exceeds `limit`.

    The integer bias is bias / (scale_w * scale_d). A channel whose weights are next to zero
    (a dead BatchNorm channel) has a tiny scale and would get an integer bias that neither
    int32 nor a float32 simulation holds; its weights may be coarser at no loss.

    Args:
        scale_w: [out_channels] or [1].
        scale_d: scale of the layer's input.
        bias: [out_channels].
        limit: largest |integer bias|.

    Returns:
        Scales of the same shape, none smaller.
    """
    # The last factor: float32 roundings on the way to the integer bias must not exceed it.
    needed = bias.detach().float().abs() / (limit * scale_d) * (1 + 2.0**-21)
    if scale_w.numel() == 1:
        needed = needed.max().reshape(1)
    return torch.maximum(scale_w, needed)
