"""HFMG: the window of a histogram whose quantization error is least.

From the full range inwards, values are given up in steps of a hundred-thousandth of all of
them, on the side where that frees more bins; the windows met on the way, down to a quarter of
the bins, are the candidates. Each is scored by the squared error of quantizing the histogram
with it, values spread evenly inside a bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.observers.histogram import Counted

# Share of the values that a step gives up on one side.
STEPS = 100_000
# Candidates scored at a time.
AT_ONCE = 64


class Density:
    """Values spread evenly inside equal bins, with the integrals that scoring needs.

    Attributes:
        counts: values in each bin, float64 [bins].
        low: lower end of the first bin.
        width: of a bin, above 0.
        total: number of values.
        mean_moment: their sum.
        square_moment: the sum of their squares.
    """

    def __init__(self, counts: Tensor, low: float, width: float) -> None:
        self.counts, self.low, self.width = counts, low, width
        # Entry 0 is the empty bin below all, the last one the empty bin above.
        self._counts = torch.cat([counts.new_zeros(1), counts, counts.new_zeros(1)])
        self._below = torch.cat([counts.new_zeros(2), counts.cumsum(0)])
        # With N(x) the number of values below x: the integral of N, and twice the integral of
        # that, at the lower end of every bin.
        step = self._below * width + self._counts * width / 2
        self._first = torch.cat([step.new_zeros(1), step[:-1].cumsum(0)])
        step = 2 * self._first * width + self._below * width**2 + self._counts * width**2 / 3
        self._second = torch.cat([step.new_zeros(1), step[:-1].cumsum(0)])
        centres = low + width * (torch.arange(counts.numel(), dtype=counts.dtype) + 0.5)
        self.total = float(counts.sum())
        self.mean_moment = float(counts @ centres)
        self.square_moment = float(counts @ (centres.square() + width**2 / 12))

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each x (0: below all), and how far into it x is."""
        place = torch.floor((x - self.low) / self.width) + 1
        place = place.clamp(0, self._counts.numel() - 1)
        into = x - (self.low + self.width * (place - 1))
        return place.long(), into.where(place > 0, torch.zeros_like(into))

    def shortfall(self, x: Tensor) -> Tensor:
        """Sum of (x - value) over the values below x."""
        i, into = self._at(x)
        return self._first[i] + self._below[i] * into + self._counts[i] / self.width / 2 * into**2

    def squared_shortfall(self, x: Tensor) -> Tensor:
        """Sum of (x - value)^2 over the values below x."""
        i, into = self._at(x)
        cubic = self._counts[i] / self.width / 3 * into**3
        return self._second[i] + 2 * self._first[i] * into + self._below[i] * into**2 + cubic

    def squared_distance(self, x: Tensor) -> Tensor:
        """Sum of (x - value)^2 over all values."""
        return self.square_moment - 2 * x * self.mean_moment + x * x * self.total


def rebinned(histogram: Counted, number: int) -> Density:
    """What was observed, in `number` bins over its range, which must not be empty."""
    fine = histogram.counts.double()
    below = torch.cat([fine.new_zeros(1), fine.cumsum(0)])
    edges = torch.linspace(histogram.low, histogram.high, number + 1, dtype=torch.float64)
    place = edges / histogram.width + fine.numel() // 2
    whole = place.floor().clamp(0, fine.numel() - 1).long()
    at_edges = below[whole] + fine[whole] * (place - whole)
    # Both ends are known exactly: all values are between them.
    at_edges[0], at_edges[-1] = 0, histogram.total
    width = (histogram.high - histogram.low) / number
    return Density(at_edges.diff().clamp(min=0), histogram.low, width)


def windows(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate windows, widest first.

    Args:
        counts: values in each bin, [bins].

    Returns:
        First bin of each window, and the bin behind its last, int64.
    """
    below = counts.double().cumsum(0)
    shares = torch.arange(STEPS + 1, dtype=torch.float64) * (float(below[-1]) / STEPS)
    # Bins on the left that k steps give up, and bins that are left when the right gives up k.
    left = torch.searchsorted(below, shares, right=True).clamp(max=counts.numel())
    above = counts.double().flip(0).cumsum(0)
    right = counts.numel() - torch.searchsorted(above, shares, right=True).clamp(max=counts.numel())
    lefts, rights = left.tolist(), right.tolist()
    start, end, a, b = 0, counts.numel(), 0, 0
    found = [(start, end)]
    while a + b < STEPS:
        freed_left = lefts[a + 1] - start
        freed_right = end - rights[b + 1]
        if freed_left > freed_right:
            start, a = lefts[a + 1], a + 1
        elif freed_right > 0:
            end, b = rights[b + 1], b + 1
        else:
            # Neither side frees a bin: the right one gives up values until it does.
            b = _last_equal(rights, b, end)
            continue
        if end - start < counts.numel() / 4:
            break
        found.append((start, end))
    pairs = torch.tensor(found)
    return pairs[:, 0], pairs[:, 1]


def _last_equal(falling: list[int], index: int, value: int) -> int:
    """The last position from `index` on at which a falling list is not below `value`."""
    low, high = index + 1, len(falling) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if falling[middle] >= value else (low, middle - 1)
    return low


def density_errors(
    density: Density, number_format: IntFormat, scale: Tensor, offset: Tensor, best: float
) -> Tensor:
    """Summed squared quantization error of candidates, clipping included.

    With thresholds t between neighbouring levels a step s apart, the error is that of the top
    level for all values, less what lower levels take off it:
    sum (x - v_top)^2 - 2 s sum over t of the shortfall of the values below t.

    Args:
        density: the values.
        number_format: the integers to quantize to.
        scale: [n].
        offset: [n].
        best: an error already reached; what cannot be below it need not be scored.

    Returns:
        float64 [n]; infinity for candidates whose clipping alone costs `best`.
    """
    scale, offset = scale.double(), offset.double()
    bottom = (number_format.qmin - offset) * scale
    top = (number_format.qmax - offset) * scale
    all_at_top = density.squared_distance(top)
    clipping = density.squared_shortfall(bottom) + all_at_top - density.squared_shortfall(top)
    errors = torch.full_like(scale, torch.inf)
    open_ = clipping < best
    steps = torch.arange(number_format.qmax - number_format.qmin, dtype=torch.float64) + 0.5
    thresholds = bottom[open_, None] + scale[open_, None] * steps
    saved = 2 * scale[open_] * density.shortfall(thresholds).sum(1)
    errors[open_] = all_at_top[open_] - saved
    return errors


def search_window(
    histogram: Counted, num_of_bins: int, number_format: IntFormat, *, symmetric: bool
) -> tuple[float, int]:
    """The scale and offset of the best window.

    Args:
        histogram: what was observed.
        num_of_bins: bins over the observed range.
        number_format: the integers to quantize to.
        symmetric: whether the offset is fixed at 0.

    Returns:
        (scale, offset), the scale a float32 value.
    """
    ends = torch.tensor([[histogram.low], [histogram.high]], dtype=torch.float32)
    if not histogram.low < histogram.high:
        scale, offset = number_format.factors(*ends, symmetric=symmetric)
        return float(scale), int(offset)
    density = rebinned(histogram, num_of_bins)
    starts, stops = windows(density.counts)
    lows = (histogram.low + density.width * starts).float()
    highs = (histogram.low + density.width * stops).float()
    scale, offset = number_format.factors(lows, highs, symmetric=symmetric)
    best, at = torch.inf, 0
    for first in range(0, scale.numel(), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        errors = density_errors(density, number_format, scale[part], offset[part], best)
        i = int(errors.argmin())
        if float(errors[i]) < best:
            best, at = float(errors[i]), first + i
    return float(scale[at]), int(offset[at])
