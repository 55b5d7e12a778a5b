"""Moving factors between two layers: balancing without a multiplication, and equalization.

Source of the equalization: Nagel et al., Data-Free Quantization Through Weight Equalization and
Bias Correction (arXiv 1906.04721), section 4.1, equation 11: with r1 and r2 the ranges of the
weights of one channel in both layers, s = sqrt(r1 r2) / r2 makes both sqrt(r1 r2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amct_pytorch.algorithms.balance import balanced_weight, input_channel_maxima
from amct_pytorch.nn.wrapped import CompressedLayer

# Over chains of layers, each pair changes what its neighbours were made equal to.
MOST_SWEEPS = 20
SETTLED = 1e-3
# Beyond these a factor would carry a next to empty channel into the range of rounding errors.
LARGEST = 1e4


def move_factors(first: CompressedLayer, second: CompressedLayer, factors: Tensor) -> None:
    """Divides output channels of one layer and multiplies input channels of the next, in place.

    Args:
        first: with as many output channels as `second` has input channels, and nothing but
            positively homogeneous functions between them.
        second: the next layer.
        factors: positive, [channels].
    """
    assert first.layout is not None and second.layout is not None
    factors = factors.to(first.weight.device, first.weight.dtype)
    with torch.no_grad():
        first.weight.div_(first.layout.along_channels(factors, first.weight.shape))
        first.bias.div_(factors.to(first.bias.dtype))
        moved = balanced_weight(second.layout, second.groups, second.weight, factors)
        second.weight.copy_(moved)


def equalize(layers: Mapping[str, CompressedLayer], pairs: Mapping[str, str]) -> dict[str, str]:
    """Makes the ranges of weights equal on both sides of each channel, in place.

    Args:
        layers: by name.
        pairs: names of first layers by those of second ones; see `graph.pairs`.

    Returns:
        A sentence for each layer that was changed.
    """
    for _ in range(MOST_SWEEPS):
        largest = 0.0
        for second, first in pairs.items():
            factors = _equalizing(layers[first], layers[second])
            largest = max(largest, float(factors.log().abs().max()))
            move_factors(layers[first], layers[second], factors)
        if largest < SETTLED:
            break
    notes: dict[str, list[str]] = {}
    for second, first in pairs.items():
        notes.setdefault(first, []).append(f"outputs equalized with {second}")
        notes.setdefault(second, []).append(f"inputs equalized with {first}")
    return {name: "; ".join(told) for name, told in notes.items()}


def _equalizing(first: CompressedLayer, second: CompressedLayer) -> Tensor:
    """s of each channel; 1 where one side has no weights other than 0."""
    assert first.layout is not None and second.layout is not None
    before = first.layout.rows(first.weight).abs().amax(1).float()
    behind = input_channel_maxima(second.layout, second.groups, second.weight)
    alive = (before > 0) & (behind > 0)
    ratio = torch.where(alive, before / behind.clamp(min=1e-30), torch.ones_like(before))
    return ratio.sqrt().clamp(1 / LARGEST, LARGEST)
