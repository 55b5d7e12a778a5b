"""IFMR: the activation range whose quantization error over the observed values is least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.observers.histogram import Histogram, PrefixSums

# Multiples scored at a time. All of them where there are no more; else every so many-th, then
# those around the best in ever smaller steps: never worse than this many over the whole range.
AT_ONCE = 1024
# Steps that a range is parted into at most; float32 scales do not tell more of them apart.
FINEST = 1 << 30


@dataclass(frozen=True)
class SearchSettings:
    """The knobs of IFMR; see the activation_quant_params of the calibration config.

    Attributes:
        max_percentile: share of values not above the search's upper starting point.
        min_percentile: share of values not below its lower starting point.
        search_range: smallest and largest multiple of a starting point that is tried.
        search_step: distance of two multiples.
    """

    max_percentile: float = 0.999999
    min_percentile: float = 0.999999
    search_range: tuple[float, float] = (0.7, 1.3)
    search_step: float = 0.01

    def count(self) -> int:
        """How many multiples there are; a step beyond float64's resolution counts as that."""
        start, end = self.search_range
        steps = min((end - start) / self.search_step, float(FINEST))
        return math.floor(steps + 1e-9) + 1

    def multiple(self, index: Tensor) -> Tensor:
        """The multiples of these numbers, float64."""
        step = max(self.search_step, (self.search_range[1] - self.search_range[0]) / FINEST)
        return self.search_range[0] + step * index


# (scale [channels, n], offset [channels, n]) -> summed squared error of each, float64.
Errors = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Found:
    """The best range of every channel so far, each [channels].

    Attributes:
        error: squared error, float64.
        low: lower end, float64.
        high: upper end, float64.
        scale: float32.
        offset: int32.
        index: number of the multiple, float64.
    """

    error: Tensor
    low: Tensor
    high: Tensor
    scale: Tensor
    offset: Tensor
    index: Tensor

    def or_better(self, other: _Found) -> _Found:
        """For every channel the one with less error; of equals, this one."""
        better = other.error < self.error
        mine, theirs = vars(self), vars(other)
        return _Found(**{name: torch.where(better, theirs[name], mine[name]) for name in mine})


def starting_points(histogram: Histogram, settings: SearchSettings) -> tuple[float, float]:
    """Where the search starts: (lo0 <= 0, hi0 >= 0).

    hi0 is the k-th largest value with k = max(1, n - floor(max_percentile * n)), lo0 the
    likewise k-th smallest.
    """
    n = histogram.total
    k_high = max(1, n - math.floor(settings.max_percentile * n))
    k_low = max(1, n - math.floor(settings.min_percentile * n))
    low = min(histogram.kth_smallest(k_low), 0.0)
    return low, max(histogram.kth_largest(k_high), 0.0)


def squared_errors(
    sums: PrefixSums, number_format: IntFormat, scale: Tensor, offset: Tensor
) -> Tensor:
    """Summed squared quantization error of every candidate, clipping included.

    With the cumulated moments S0, S1, S2, the points that round to a level of value v
    contribute S2 - 2 v S1 + v^2 S0, so a candidate costs one look-up per level.

    Args:
        sums: the histogram's prefix sums.
        number_format: the integers to quantize to.
        scale: candidates' scales, [n].
        offset: candidates' offsets, [n].

    Returns:
        float64 [n].
    """
    codes = torch.arange(number_format.qmin, number_format.qmax + 1, dtype=torch.float64)
    values = (codes - offset.double()[:, None]) * scale.double()[:, None]
    inner = sums.index((values[:, 1:] + values[:, :-1]) / 2)
    first = torch.zeros_like(inner[:, :1])
    last = torch.full_like(first, sums.moments.shape[1] - 1)
    s0, s1, s2 = sums.moments[:, torch.cat([first, inner, last], dim=1)].diff(dim=-1)
    error: Tensor = s2 - 2 * values * s1 + values * values * s0
    return error.sum(1)


def search_range(
    histogram: Histogram,
    settings: SearchSettings,
    number_format: IntFormat,
    *,
    symmetric: bool,
    from_zero: bool = False,
) -> tuple[float, int]:
    """The scale and offset with the least mean squared error over the observed values.

    See `search_ranges`, of which this is the case of one channel.

    Args:
        histogram: what was observed.
        settings: starting points and multiples to try.
        number_format: the integers to quantize to.
        symmetric: whether the offset is fixed at 0.
        from_zero: whether the lower end is fixed at 0, whatever was observed below it.

    Returns:
        (scale, offset), the scale a float32 value.
    """
    low, high = starting_points(histogram, settings)
    if from_zero:
        low = 0.0
    sums = histogram.prefix_sums()

    def errors(scale: Tensor, offset: Tensor) -> Tensor:
        return squared_errors(sums, number_format, scale[0], offset[0])[None]

    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    scale, offset = search_ranges(
        ends[0], ends[1], errors, settings, number_format, symmetric=symmetric
    )
    return float(scale), int(offset)


def search_ranges(
    low: Tensor,
    high: Tensor,
    errors: Errors,
    settings: SearchSettings,
    number_format: IntFormat,
    *,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """For every channel, the scale and offset with the least squared error.

    Symmetric ranges move both ends together. Asymmetric ranges move the upper end with the
    lower one fixed, as IFMR is defined, then the lower end, then the upper end once more;
    the best range met on the way wins, so it is never worse than the definition's.

    Args:
        low: where the lower ends start, <= 0, float64 [channels].
        high: where the upper ends start, >= 0, float64 [channels].
        errors: the summed squared error of candidates.
        settings: multiples to try.
        number_format: the integers to quantize to.
        symmetric: whether the offsets are fixed at 0.

    Returns:
        Scales, float32 [channels], and offsets, int32 [channels].
    """

    def score(index: Tensor, low: Tensor, high: Tensor, moves: tuple[bool, bool]) -> _Found:
        multiples = settings.multiple(index)
        fixed = torch.ones_like(multiples)
        lows = low[:, None] * (multiples if moves[0] else fixed)
        highs = high[:, None] * (multiples if moves[1] else fixed)
        scale, offset = number_format.factors(lows.float(), highs.float(), symmetric=symmetric)
        found = errors(scale, offset)
        i = found.argmin(1, keepdim=True)
        index = index.expand_as(found)
        return _Found(*(x.gather(1, i)[:, 0] for x in (found, lows, highs, scale, offset, index)))

    def best(low: Tensor, high: Tensor, moves: tuple[bool, bool]) -> _Found:
        last = settings.count() - 1
        stride = -(-(last + 1) // AT_ONCE)
        index = torch.arange(0, last + 1, stride, dtype=torch.float64, device=low.device)
        found = score(index[None], low, high, moves)
        while stride > 1:
            reach = stride
            stride = -(-2 * reach // AT_ONCE)
            around = torch.arange(-reach, reach + 1, stride, device=low.device)
            index = (found.index[:, None] + around).clamp(0, last)
            found = found.or_better(score(index, low, high, moves))
        return found

    if symmetric:
        found = best(low, high, (True, True))
        return found.scale, found.offset
    found = best(low, high, (False, True))
    if bool((low < 0).any()):
        lower = best(low, found.high, (True, False))
        upper = best(lower.low, high, (False, True))
        found = found.or_better(lower).or_better(upper)
    return found.scale, found.offset
