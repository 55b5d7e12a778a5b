"""A streaming histogram of every channel by itself, cheap for one token as for thousands.

As in `histogram`, bins are [i * w, (i + 1) * w) with w a power of two, here one for every
channel: it follows from the largest magnitude that the channel has seen and from nothing else,
and a wider range only adds neighbouring bins together. Histograms of the same data in other
batches, in another order, or on several processes and merged are equal bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.observers.hfmg import search_window
from amct_pytorch.observers.histogram import SMALLEST_EXPONENT
from amct_pytorch.observers.range_search import SearchSettings, search_ranges

# Bins on each side of zero: a channel's largest magnitude falls into the outer half of them, so
# an 8-bit step of a symmetric range spans 8 bins or more.
HALF_BINS = 2**11
# log2 of that.
HALF_BITS = HALF_BINS.bit_length() - 1
# Values counted at a time.
CHUNK = 2**20
# Channels searched at a time: the scratch memory stays in the processor's cache.
CHANNELS_AT_ONCE = 8
# Counts are int32.
MOST = 2**31 - 1


class ChannelHistogram:
    """Counts of the values of every channel over any number of batches.

    Memory: 2 * HALF_BINS int32 a channel (16 KiB), whatever the number of batches.

    Attributes:
        low: smallest value of each channel, float64 [channels]; inf before any.
        high: largest value of each channel, float64 [channels]; -inf before any.
        total: number of values each channel has seen.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.total = 0
        self.low = torch.full((channels,), math.inf, dtype=torch.float64, device=device)
        self.high = torch.full((channels,), -math.inf, dtype=torch.float64, device=device)
        self._counts = torch.zeros(channels, 2 * HALF_BINS, dtype=torch.int32, device=device)
        # Channel i's bins cover [-2^e, 2^e) with e entry i.
        self._exponent = torch.full((channels,), SMALLEST_EXPONENT, device=device)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self._counts.shape[0]

    @property
    def widths(self) -> Tensor:
        """Width of each channel's bins, float64 [channels]."""
        return torch.ldexp(torch.ones_like(self.low), self._exponent - HALF_BITS)

    def update(self, x: Tensor) -> None:
        """Counts every value of `x`.

        Args:
            x: floating tensor [..., channels] on the histogram's device.

        Raises:
            ValueError: `x` holds NaN or an infinity, another number of channels, or is the
                value beyond the 2^31 - 1 that can be counted; nothing is counted then.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[1] != self.channels:
            raise ValueError(f"{rows.shape[1]} channels after {self.channels}")
        if rows.shape[0] == 0:
            return
        if self.total + rows.shape[0] > MOST:
            raise ValueError("more than 2^31 - 1 values a channel")
        # Faster than aminmax along the first axis.
        low, high = rows.amin(0).double(), rows.amax(0).double()
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ValueError("NaN or infinity")
        self._extend(low, high, rows.shape[0])
        inverse = torch.ldexp(torch.ones_like(self.low), HALF_BITS - self._exponent)
        # float32 is exact, but for float64 values and where small products would become zero.
        small = rows.dtype != torch.float64 and bool(inverse.min() >= 2.0**-20)
        inverse = inverse.float() if small else inverse
        first = torch.arange(self.channels, device=rows.device) * (2 * HALF_BINS) + HALF_BINS
        flat = self._counts.view(-1)
        for part in rows.split(max(1, CHUNK // self.channels)):
            place = (part.to(inverse.dtype) * inverse).floor_().long().add_(first).view(-1)
            flat.scatter_add_(0, place, torch.ones_like(place, dtype=torch.int32))

    def merge(self, other: ChannelHistogram) -> None:
        """Adds what `other` counted; the order of merges does not change the result.

        Raises:
            ValueError: see `update`.
        """
        if other.total == 0:
            return
        if other.channels != self.channels:
            raise ValueError(f"{other.channels} channels after {self.channels}")
        if self.total + other.total > MOST:
            raise ValueError("more than 2^31 - 1 values a channel")
        self._extend(other.low.to(self.low), other.high.to(self.high), other.total)
        doublings = self._exponent - other._exponent.to(self._exponent)
        self._counts += _coarsened(other._counts.to(self._counts.device), doublings)

    def _extend(self, low: Tensor, high: Tensor, number: int) -> None:
        """Takes note of `number` values a channel in [low, high]; widens bins they fall out of."""
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        magnitude = torch.maximum(-self.low, self.high)
        # frexp gives x = m * 2^e with m < 1, and e = 0 for zero, whose bins may be the smallest.
        exponent = torch.frexp(magnitude).exponent.to(self._exponent)
        exponent = exponent.where(magnitude > 0, self._exponent).maximum(self._exponent)
        if self.total:
            self._counts = _coarsened(self._counts, exponent - self._exponent)
        self._exponent = exponent
        self.total += number

    def search(
        self, settings: SearchSettings, number_format: IntFormat, *, symmetric: bool
    ) -> tuple[Tensor, Tensor]:
        """IFMR's scale and offset of every channel; see `search_ranges`.

        Args:
            settings: starting points and multiples to try.
            number_format: the integers to quantize to.
            symmetric: whether the offsets are fixed at 0.

        Returns:
            Scales, float32 [channels], and offsets, int32 [channels].
        """
        low, high = self.starting_points(settings)
        found = []
        for first in range(0, self.channels, CHANNELS_AT_ONCE):
            part = slice(first, first + CHANNELS_AT_ONCE)
            sums = _Sums.of(self._counts[part], self.widths[part])

            def errors(scale: Tensor, offset: Tensor, sums: _Sums = sums) -> Tensor:
                return sums.squared_errors(number_format, scale, offset)

            found.append(
                search_ranges(
                    low[part], high[part], errors, settings, number_format, symmetric=symmetric
                )
            )
        return torch.cat([scale for scale, _ in found]), torch.cat([offset for _, offset in found])

    def search_windows(
        self, num_of_bins: int, number_format: IntFormat, *, symmetric: bool
    ) -> tuple[Tensor, Tensor]:
        """HFMG's scale and offset of every channel; see `search_window`.

        Args:
            num_of_bins: bins over each channel's range.
            number_format: the integers to quantize to.
            symmetric: whether the offsets are fixed at 0.

        Returns:
            Scales, float32 [channels], and offsets, int32 [channels].
        """
        found = [
            search_window(self.channel(i), num_of_bins, number_format, symmetric=symmetric)
            for i in range(self.channels)
        ]
        scales, offsets = zip(*found, strict=True)
        return torch.tensor(scales), torch.tensor(offsets, dtype=torch.int32)

    def starting_points(self, settings: SearchSettings) -> tuple[Tensor, Tensor]:
        """Where the search starts: (lo0 <= 0, hi0 >= 0), float64 [channels] each.

        The k-th largest value with k = max(1, n - floor(max_percentile * n)) is exact for
        k = 1, else it is the upper end of its bin; the k-th smallest likewise.
        """
        high = self._end(self._counts.flip(1), self.high, settings.max_percentile)
        low = -self._end(self._counts, -self.low, settings.min_percentile)
        return low.clamp(max=0), high.clamp(min=0)

    def _end(self, counts: Tensor, furthest: Tensor, percentile: float) -> Tensor:
        """The k-th value from the outside, as a distance from zero to that side."""
        k = max(1, self.total - math.floor(percentile * self.total))
        if k == 1:
            return furthest
        reached = counts.cumsum(1, dtype=torch.int32) >= k
        bins = reached.int().argmax(1)
        return torch.minimum((HALF_BINS - bins) * self.widths, furthest)

    def channel(self, index: int) -> OneChannel:
        """What one channel has seen, on the CPU."""
        return OneChannel(
            float(self.low[index]),
            float(self.high[index]),
            self.total,
            float(self.widths[index]),
            self._counts[index].long().cpu(),
        )


@dataclass
class OneChannel:
    """One row of a `ChannelHistogram`; see `Counted`."""

    low: float
    high: float
    total: int
    width: float
    counts: Tensor


@dataclass
class _Sums:
    """Cumulated counts of some channels, values taken to be at the centres of their bins.

    Attributes:
        width: of each channel's bins, float64 [channels, 1].
        below: entry [c, i]: values of channel c in bins before bin i, float64
            [channels, 2 * HALF_BINS + 1].
        moment: the sum of those values in units of the width, same shape.
        square: the sum of the squares of all, in those units, float64 [channels, 1].
    """

    width: Tensor
    below: Tensor
    moment: Tensor
    square: Tensor

    @classmethod
    def of(cls, counts: Tensor, widths: Tensor) -> _Sums:
        counts = counts.double()
        centres = torch.arange(-HALF_BINS, HALF_BINS, dtype=torch.float64, device=counts.device)
        centres += 0.5
        pad = torch.nn.functional.pad
        return cls(
            widths[:, None],
            pad(counts.cumsum(1), (1, 0)),
            pad((counts * centres).cumsum(1), (1, 0)),
            (counts @ centres.square())[:, None],
        )

    def squared_errors(self, number_format: IntFormat, scale: Tensor, offset: Tensor) -> Tensor:
        """Summed squared quantization error of candidates, clipping included.

        The thresholds t_j between neighbouring levels are a step s apart, so summation by
        parts gives sum (x - v_top)^2 + 2 s sum_j [S1(t_j) - t_j S0(t_j)], with S0 and S1 the
        number and the sum of the values below t_j: two look-ups a threshold.

        Args:
            number_format: the integers to quantize to.
            scale: float32 [channels, n].
            offset: int32 [channels, n].

        Returns:
            float64 [channels, n].
        """
        step = scale.double() / self.width
        first = (number_format.qmin + 0.5 - offset) * step
        top = (number_format.qmax - offset) * step
        number = number_format.qmax - number_format.qmin
        j = torch.arange(number, device=step.device)
        # A threshold next to a bin's centre may fall to either side of it: that value is worth
        # nothing in the sum either way, so float32 will do.
        place = (step.float()[..., None] * j).add_((first + (HALF_BINS - 0.5)).float()[..., None])
        index = place.ceil_().clamp_(0, 2 * HALF_BINS).int()
        rows = torch.arange(step.shape[0], device=step.device, dtype=torch.int32)
        index.add_((rows * (2 * HALF_BINS + 1))[:, None, None])
        below = self.below.view(-1).index_select(0, index.view(-1)).view(place.shape)
        moment = self.moment.view(-1).index_select(0, index.view(-1)).view(place.shape).sum(-1)
        weights = torch.stack([torch.ones_like(j), j], dim=1).double()
        plain, by_number = (below @ weights).unbind(-1)
        total, all_moment = self.below[:, -1:], self.moment[:, -1:]
        at_top = self.square - 2 * top * all_moment + top.square() * total
        saved = moment - first * plain - step * by_number
        return (at_top + 2 * step * saved).clamp(min=0) * self.width.square()


def _coarsened(counts: Tensor, doublings: Tensor) -> Tensor:
    """The same counts in bins 2^doublings times as wide, doublings [channels] >= 0."""
    if not bool(doublings.any()):
        return counts
    result = counts.clone()
    for times in doublings.unique().tolist():
        if times == 0:
            continue
        # At most every bin shrinks into the two that touch zero.
        factor = 2 ** min(times, HALF_BITS)
        rows = (doublings == times).nonzero().flatten()
        merged = counts[rows].view(len(rows), -1, factor).sum(2, dtype=counts.dtype)
        start = HALF_BINS - merged.shape[1] // 2
        fresh = torch.zeros_like(counts[rows])
        fresh[:, start : start + merged.shape[1]] = merged
        result[rows] = fresh
    return result
