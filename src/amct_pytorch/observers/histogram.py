"""A streaming histogram whose bins never depend on the order in which data came.

Bins are [i * w, (i + 1) * w) with w a power of two, so zero is always an edge, a product
with 1/w is exact, and a wider range only ever adds neighbouring bins together. Histograms
of the same data in other batches, in another order or on several processes and merged are
equal bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Bins on each side of zero. The largest |x| always falls into the upper half of them, so
# an 8-bit step spans 32 to 128 bins.
HALF_BINS = 2**14
# Values that are binned at a time: the scratch memory stays in the processor's cache.
CHUNK = 2**18
# Values below 2^this share the bins of that range; its 1/w is still a finite float32.
SMALLEST_EXPONENT = -100


@dataclass
class PrefixSums:
    """Cumulated moments of a histogram, each bin's values taken at its centre.

    Attributes:
        width: bin width.
        moments: float64 [3, 2 * HALF_BINS + 1]; entry [p, i] is the sum of count * x^p over
            the bins before bin i.
    """

    width: float
    moments: Tensor

    def index(self, threshold: Tensor) -> Tensor:
        """How many bins have their centre below each threshold."""
        position = torch.ceil(threshold / self.width - 0.5) + HALF_BINS
        return position.clamp(0, 2 * HALF_BINS).to(torch.int64)


class Histogram:
    """Counts of one tensor's values over any number of batches.

    Memory: 2 * HALF_BINS int64 (256 KiB), whatever the number of batches.

    Attributes:
        counts: int64 [2 * HALF_BINS]; entry i counts values in
            [(i - HALF_BINS) * width, (i - HALF_BINS + 1) * width).
        low: smallest value seen, 0 before any.
        high: largest value seen, 0 before any.
        total: number of values seen.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * HALF_BINS, dtype=torch.int64)
        self.low = 0.0
        self.high = 0.0
        self.total = 0
        self._exponent = SMALLEST_EXPONENT

    @property
    def width(self) -> float:
        """Width of one bin, a power of two."""
        return math.ldexp(1.0, self._exponent) / HALF_BINS

    def update(self, x: Tensor) -> None:
        """Counts every value of `x`.

        Args:
            x: floating tensor of any shape, dtype and device.

        Raises:
            ValueError: `x` holds NaN or an infinity; nothing is counted then.
        """
        if x.numel() == 0:
            return
        low, high = (float(end) for end in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinity")
        self._extend(low, high, x.numel())
        inverse = 1.0 / self.width
        flat = x.detach().flatten()
        # float32 is exact, but for float64 values and where small products would become zero.
        dtype = torch.float64 if x.dtype == torch.float64 or inverse < 2.0**-20 else torch.float32
        scratch = torch.empty(min(CHUNK, flat.numel()), dtype=dtype, device=x.device)
        index = torch.empty_like(scratch, dtype=torch.int32)
        counts = torch.zeros(2 * HALF_BINS, dtype=torch.int64, device=x.device)
        for part in flat.split(CHUNK):
            scaled, bins = scratch[: part.numel()], index[: part.numel()]
            scaled.copy_(part).mul_(inverse)
            if low < 0:
                scaled.floor_()
            bins.copy_(scaled).add_(HALF_BINS)
            counts += torch.bincount(bins, minlength=2 * HALF_BINS)
        self.counts += counts.cpu()

    def merge(self, other: Histogram) -> None:
        """Adds what `other` counted; the order of merges does not change the result."""
        if other.total == 0:
            return
        self._extend(other.low, other.high, other.total)
        self.counts += _coarsened(other.counts, self._exponent - other._exponent)

    def _extend(self, low: float, high: float, number: int) -> None:
        """Takes note of `number` values in [low, high] and widens the bins if need be."""
        self.low = min(low, self.low) if self.total else low
        self.high = max(high, self.high) if self.total else high
        self.total += number
        largest = max(-self.low, self.high)
        # frexp gives |x| = m * 2^e with m < 1, so |x| stays below 2^e. Zeros need no range: one
        # taken for them would stay, and the bins would depend on what came first.
        exponent = math.frexp(largest)[1] if largest > 0 else SMALLEST_EXPONENT
        exponent = max(exponent, SMALLEST_EXPONENT)
        if exponent > self._exponent:
            self.counts = _coarsened(self.counts, exponent - self._exponent)
            self._exponent = exponent

    def prefix_sums(self) -> PrefixSums:
        """Cumulated count, sum and sum of squares, for scoring many ranges at once."""
        centres = (torch.arange(-HALF_BINS, HALF_BINS, dtype=torch.float64) + 0.5) * self.width
        counts = self.counts.double()
        rows = torch.stack([counts, counts * centres, counts * centres * centres])
        start = torch.zeros(3, 1, dtype=torch.float64)
        return PrefixSums(self.width, torch.cat([start, rows.cumsum(1)], dim=1))

    def kth_largest(self, k: int) -> float:
        """The k-th largest value (k from 1), exact for k = 1, else exact to its bin."""
        if k <= 1:
            return self.high
        cumulated = self.counts.flip(0).cumsum(0)
        from_top = int(torch.searchsorted(cumulated, k))
        edge = (HALF_BINS - from_top) * self.width
        return min(max(edge, self.low), self.high)

    def kth_smallest(self, k: int) -> float:
        """The k-th smallest value (k from 1), exact for k = 1, else exact to its bin."""
        if k <= 1:
            return self.low
        from_bottom = int(torch.searchsorted(self.counts.cumsum(0), k))
        edge = (from_bottom - HALF_BINS) * self.width
        return min(max(edge, self.low), self.high)


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
