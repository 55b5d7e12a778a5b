"""The range of a unit's input that its output asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from amct_pytorch.algorithms.unit import Unit
from amct_pytorch.formats import IntFormat

# Both ends together, then each end alone, twice.
TOGETHER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.5)
ALONE = (0.8, 0.9, 0.95, 1.05, 1.1, 1.2)
# Rows that are tried: fewer where each has many values, as in depthwise layers.
MOST_ROWS, FEWEST_ROWS, VALUES = 1024, 256, 2**22


def quantized(x: Tensor, scale: float, offset: int, fmt: IntFormat) -> Tensor:
    """Real values of what `x` is quantized to, as the deploy model does it."""
    inverse = float(torch.tensor(1.0) / torch.tensor(scale))
    return fmt.steps_by_inverse(x, inverse, offset).mul_(scale)


def best_range(
    unit: Unit, scale: float, offset: int, fmt: IntFormat, *, symmetric: bool
) -> tuple[float, int]:
    """The scale and offset with the least error of the unit's output, near to given ones.

    A range that is right for the values of an input may be wrong for the layer: values differ in
    how much depends on them. Errors of all channels add up as they are: in units of each channel's
    own power, those that are nearly always 0 decide, and what the others need is clipped
    (EfficientNet-Lite0 on 8 photos: 19.1 dB on others, and 24.9 so).

    Args:
        unit: with inputs that are not quantized.
        scale: where to start from.
        offset: likewise.
        fmt: the integers.
        symmetric: whether the offset has to be 0.
    """
    groups, _, size = unit.inputs.shape
    number = min(MOST_ROWS, max(FEWEST_ROWS, VALUES // (groups * size)))
    few = unit.of_rows(unit.some_rows(number))

    def error(scale: float, offset: int) -> float:
        y = replace(few, inputs=quantized(few.inputs, scale, offset, fmt)).outputs(unit.weight)
        # A shift of the mean is what the bias is for.
        return few.loss(few.errors(y + (few.targets - y).mean(0)))

    low, high = (fmt.qmin - offset) * scale, (fmt.qmax - offset) * scale
    best, least = (scale, offset), error(scale, offset)
    for phase in ("together", "alone", "alone"):
        for tried_low, tried_high in list(_neighbours(low, high, phase)):
            tried = _factors(tried_low, tried_high, fmt, symmetric)
            found = error(*tried)
            if found < least:
                best, least, low, high = tried, found, tried_low, tried_high
    return best


def _neighbours(low: float, high: float, phase: str) -> Iterator[tuple[float, float]]:
    if phase == "together":
        yield from ((low * ratio, high * ratio) for ratio in TOGETHER)
        return
    # An end at 0 stays there.
    if low:
        yield from ((low * ratio, high) for ratio in ALONE)
    if high:
        yield from ((low, high * ratio) for ratio in ALONE)


def _factors(low: float, high: float, fmt: IntFormat, symmetric: bool) -> tuple[float, int]:
    scale, offset = fmt.factors(torch.tensor(low), torch.tensor(high), symmetric=symmetric)
    return float(scale), int(offset)
