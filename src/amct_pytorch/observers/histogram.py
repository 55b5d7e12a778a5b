"""A streaming histogram whose state never depends on the order in which data came.

Bins are [i * w, (i + 1) * w) with w a power of two, so zero is always an edge, a product
with 1/w is exact, and a wider range only ever adds neighbouring bins together. The bins cover
all but the few values of largest magnitude, which are kept one by one: an outlier does not
make them coarse. That range only ever grows with more data. Histograms of the same data in
other batches, in another order or on several processes and merged are equal bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amct_pytorch.observers.tails import KEPT, Rows, Tail

# Bins on each side of zero. The KEPT-th largest |x| always falls into the upper half of them,
# so an 8-bit step over a range that reaches it spans 32 bins or more.
HALF_BINS = 2**14
# Values that are binned at a time: the scratch memory stays in the processor's cache.
CHUNK = 2**18
# Values below 2^this share the bins of that range; its 1/w is still a finite float32.
SMALLEST_EXPONENT = -100
# Numbers in a stored histogram.
PACKED = 4 + 2 * KEPT + 2 * HALF_BINS


class Counted(Protocol):
    """What was seen of one tensor, or of one channel, counted in bins.

    Attributes:
        low: smallest value seen.
        high: largest value seen.
        total: number of values seen.
    """

    low: float
    high: float
    total: int

    @property
    def width(self) -> float:
        """Width of a bin."""

    @property
    def counts(self) -> Tensor:
        """Values in each bin, int64; zero is the edge in the middle."""


@dataclass
class PrefixSums:
    """Cumulated moments of what a histogram holds.

    Attributes:
        points: float64 [n], rising: where values are taken to be. A bin's values are at its
            centre, those outside the bins are where they are.
        moments: float64 [3, n + 1]; entry [p, i] is the sum of count * x^p over the points
            before point i.
    """

    points: Tensor
    moments: Tensor

    def index(self, threshold: Tensor) -> Tensor:
        """How many points are below each threshold."""
        return torch.searchsorted(self.points, threshold)


class Histogram:
    """Counts of one tensor's values over any number of batches.

    The KEPT largest and the KEPT smallest values are kept as they are. The bins cover
    [-2^e, 2^e) with e the least for which fewer than KEPT values have a magnitude of 2^e or
    more; so each value is in a bin or in a tail, or in both.

    Memory: 2 * HALF_BINS int64 (256 KiB) and 2 * KEPT float64 (16 KiB), whatever the number
    of batches.

    Attributes:
        low: smallest value seen, 0 before any.
        high: largest value seen, 0 before any.
        total: number of values seen.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.total = 0
        self._inner = torch.zeros(2 * HALF_BINS, dtype=torch.int64)
        self._exponent = SMALLEST_EXPONENT
        self._largest = Tail()
        self._smallest = Tail()  # of the negatives

    @property
    def width(self) -> float:
        """Width of one bin of `counts`, a power of two."""
        return _width(_exponent_of(max(-self.low, self.high)))

    @property
    def counts(self) -> Tensor:
        """int64 [2 * HALF_BINS], every value seen, in bins that reach the largest |x|.

        Entry i counts values in [(i - HALF_BINS) * width, (i - HALF_BINS + 1) * width).
        """
        exponent = _exponent_of(max(-self.low, self.high))
        inner = _coarsened(self._inner, exponent - self._exponent)
        return inner + _binned(self._outside(), exponent)

    def update(self, x: Tensor) -> None:
        """Counts every value of `x`.

        Args:
            x: floating tensor of any shape, dtype and device.

        Raises:
            ValueError: `x` holds NaN or an infinity; nothing is counted then.
        """
        if x.numel() == 0:
            return
        flat = x.detach().flatten()
        rows = Rows(flat, short=not self._largest.full)
        if not (math.isfinite(rows.low) and math.isfinite(rows.high)):
            raise ValueError("NaN or infinity")
        self._note(rows.low, rows.high, flat.numel())
        largest, smallest = self._largest.values, self._smallest.values
        self._largest.update(rows)
        self._smallest.update(rows, negated=True)
        exponent = self._needed_exponent()
        if exponent > self._exponent:
            self._widen(exponent, _beyond(largest, smallest, self._exponent))
        self._inner = self._inner + self._count(flat, rows.low, rows.high)

    def _count(self, flat: Tensor, low: float, high: float) -> Tensor:
        """Counts of the values that the bins cover; `low` and `high` are the ends of all."""
        inverse = 1.0 / _width(self._exponent)
        reaches_out = low * inverse < -HALF_BINS or high * inverse >= HALF_BINS
        # float32 is exact, but for float64 values and where small products would become zero.
        dtype = torch.float32
        if flat.dtype == torch.float64 or inverse < 2.0**-20:
            dtype = torch.float64
            flat = flat.cpu()  # not every device has float64
        scratch = torch.empty(min(CHUNK, flat.numel()), dtype=dtype, device=flat.device)
        index = torch.empty_like(scratch, dtype=torch.int32)
        # One more bin on each side takes what lies outside.
        first = -HALF_BINS - 1 if low < 0 else 0
        counts = torch.zeros(HALF_BINS + 1 - first, dtype=torch.int64, device=flat.device)
        for part in flat.split(CHUNK):
            scaled, bins = scratch[: part.numel()], index[: part.numel()]
            if part.dtype == dtype:
                torch.mul(part, inverse, out=scaled)
            else:
                scaled.copy_(part).mul_(inverse)
            if reaches_out:
                scaled.clamp_(-HALF_BINS - 1, HALF_BINS)
            if low < 0:
                scaled.floor_()
            bins.copy_(scaled)
            if low < 0:
                bins.sub_(first)
            counts += torch.bincount(bins, minlength=counts.numel())
        result = torch.zeros_like(self._inner)
        result[-HALF_BINS:] = counts[-HALF_BINS - 1 : -1]
        if low < 0:
            result[:HALF_BINS] = counts[1 : HALF_BINS + 1]
        return result

    def merge(self, other: Histogram) -> None:
        """Adds what `other` counted; the order of merges does not change the result."""
        if other.total == 0:
            return
        outside = torch.cat([self._outside(), other._outside()])
        theirs, their_exponent = other._inner, other._exponent
        self._note(other.low, other.high, other.total)
        self._largest.add(other._largest.values)
        self._smallest.add(other._smallest.values)
        self._widen(self._needed_exponent(), outside)
        self._inner = self._inner + _coarsened(theirs, self._exponent - their_exponent)

    def _note(self, low: float, high: float, number: int) -> None:
        """Takes note of `number` values in [low, high]."""
        self.low = min(low, self.low) if self.total else low
        self.high = max(high, self.high) if self.total else high
        self.total += number

    def _outside(self) -> Tensor:
        """The values that the bins do not cover, rising: fewer than KEPT, all in the tails."""
        return _beyond(self._largest.values, self._smallest.values, self._exponent)

    def _needed_exponent(self) -> int:
        """The e of the class's docstring, from the tails."""
        largest, smallest = self._largest.values, self._smallest.values
        limit = _width(self._exponent) * HALF_BINS
        if int((largest >= limit).sum() + (smallest >= limit).sum()) < KEPT:
            return self._exponent
        return _exponent_of(float(torch.cat([largest, smallest]).topk(KEPT).values[-1]))

    def _widen(self, exponent: int, outside: Tensor) -> None:
        """Widens the bins and takes in what of `outside`, not covered so far, they cover now."""
        self._inner = _coarsened(self._inner, exponent - self._exponent)
        self._exponent = exponent
        self._inner = self._inner + _binned(outside, exponent)

    def packed(self) -> Tensor:
        """Everything that was counted, as one tensor to be stored: float64 [PACKED], exact."""
        head = [self.low, self.high, self.total, self._exponent]
        numbers = torch.tensor(head, dtype=torch.float64)
        tails = [self._largest.values, self._smallest.values]
        return torch.cat([numbers, *tails, self._inner.double()])

    @classmethod
    def unpacked(cls, packed: Tensor) -> Histogram:
        """The histogram of which `packed` came."""
        packed = packed.cpu()
        histogram = cls()
        head, largest, smallest, inner = packed.split([4, KEPT, KEPT, 2 * HALF_BINS])
        histogram.low, histogram.high = float(head[0]), float(head[1])
        histogram.total, histogram._exponent = int(head[2]), int(head[3])
        histogram._largest.values, histogram._smallest.values = largest.clone(), smallest.clone()
        histogram._inner = inner.long()
        return histogram

    def prefix_sums(self) -> PrefixSums:
        """Cumulated count, sum and sum of squares, for scoring many ranges at once."""
        centres = torch.arange(-HALF_BINS, HALF_BINS, dtype=torch.float64) + 0.5
        outside = self._outside()
        below, above = outside[outside < 0], outside[outside >= 0]
        points = torch.cat([below, centres * _width(self._exponent), above])
        counts = torch.cat([torch.ones_like(below), self._inner.double(), torch.ones_like(above)])
        rows = torch.stack([counts, counts * points, counts * points * points])
        start = torch.zeros(3, 1, dtype=torch.float64)
        return PrefixSums(points, torch.cat([start, rows.cumsum(1)], dim=1))

    def kth_largest(self, k: int) -> float:
        """The k-th largest value (k from 1), exact for k <= KEPT, else exact to its bin."""
        if self.total == 0:
            return 0.0
        k = min(max(k, 1), self.total)
        if k <= KEPT:
            return float(self._largest.values[k - 1])
        k -= int((self._outside() >= 0).sum())
        from_top = int(torch.searchsorted(self._inner.flip(0).cumsum(0), k))
        edge = (HALF_BINS - from_top) * _width(self._exponent)
        return min(max(edge, self.low), self.high)

    def kth_smallest(self, k: int) -> float:
        """The k-th smallest value (k from 1), exact for k <= KEPT, else exact to its bin."""
        if self.total == 0:
            return 0.0
        k = min(max(k, 1), self.total)
        if k <= KEPT:
            return 0.0 - float(self._smallest.values[k - 1])
        k -= int((self._outside() < 0).sum())
        from_bottom = int(torch.searchsorted(self._inner.cumsum(0), k))
        edge = (from_bottom - HALF_BINS) * _width(self._exponent)
        return min(max(edge, self.low), self.high)


def _beyond(largest: Tensor, smallest: Tensor, exponent: int) -> Tensor:
    """The values outside [-2^exponent, 2^exponent) of two tails, rising."""
    limit = _width(exponent) * HALF_BINS
    below = smallest[smallest > limit]
    return torch.cat([-below, largest[largest >= limit].flip(0)])


def _exponent_of(magnitude: float) -> int:
    """The least allowed e with magnitude < 2^e."""
    # frexp gives x = m * 2^e with m < 1.
    exponent = math.frexp(magnitude)[1] if magnitude > 0 else SMALLEST_EXPONENT
    return max(exponent, SMALLEST_EXPONENT)


def _width(exponent: int) -> float:
    """Width of the bins that cover [-2^exponent, 2^exponent)."""
    return math.ldexp(1.0, exponent - HALF_BINS.bit_length() + 1)


def _binned(values: Tensor, exponent: int) -> Tensor:
    """Counts of those of a few float64 values that are in [-2^exponent, 2^exponent)."""
    bins = torch.floor(values / _width(exponent)) + HALF_BINS
    bins = bins[(bins >= 0) & (bins < 2 * HALF_BINS)]
    return torch.bincount(bins.to(torch.int64), minlength=2 * HALF_BINS)


def _coarsened(counts: Tensor, doublings: int) -> Tensor:
    """The same counts in bins 2^doublings times as wide."""
    if doublings <= 0:
        return counts
    result = torch.zeros_like(counts)
    if doublings > HALF_BINS.bit_length() - 1:
        # Every bin shrinks into the two that touch zero.
        result[HALF_BINS - 1] = counts[:HALF_BINS].sum()
        result[HALF_BINS] = counts[HALF_BINS:].sum()
        return result
    merged = counts.view(-1, 2**doublings).sum(1)
    start = HALF_BINS - merged.numel() // 2
    result[start : start + merged.numel()] = merged
    return result
