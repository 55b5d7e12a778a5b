"""The largest values of a stream, kept one by one.

The multiset of the largest values does not depend on the order in which they came, so tails of
the same data in other batches, or merged from several processes, are equal bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Values that are kept. IFMR's default starting points have ranks of a millionth of the number
# of values: these are exact up to a billion of them.
KEPT = 1024
# Most values of which one maximum is taken, to find the few values worth a closer look.
ROW = 512
# Values looked at in one step: what is converted stays in the processor's cache.
STEP = 2**18


class Rows:
    """A tensor cut into short rows, with the least and the largest value of each.

    Attributes:
        body: the rows, [n, length].
        rest: the fewer than `length` values that are left over.
        lows: least value of each row, float32 or float64.
        highs: largest value of each row, float32 or float64.
        low: least value of all; NaN if there is a NaN.
        high: largest value of all; NaN if there is a NaN.
    """

    def __init__(self, flat: Tensor, *, short: bool) -> None:
        """Cuts up a tensor.

        Args:
            flat: at least one value, one axis.
            short: whether rows should be short enough for the KEPT largest row ends to leave
                out most of the values: where it is not known yet which values are large.
        """
        length = ROW
        if short:
            length = 2 ** max(0, min(ROW // 2, flat.numel() // (4 * KEPT)).bit_length() - 1)
        number = flat.numel() // length
        self.body = flat[: number * length].view(number, length)
        self.rest = flat[number * length :]
        lows, highs = [], []
        for part in (*self.body.split(STEP // length), self.rest[None]):
            if part.numel():
                # Minima of half precision are several times slower than those of float32.
                wide = _wide(part)
                lows.append(wide.amin(1))
                highs.append(wide.amax(1))
        all_lows, all_highs = torch.cat(lows), torch.cat(highs)
        self.low, self.high = float(all_lows.amin()), float(all_highs.amax())
        self.lows, self.highs = all_lows[:number], all_highs[:number]


class Tail:
    """The KEPT largest values of a stream.

    Attributes:
        values: float64 [KEPT], falling; -inf where fewer were seen.
    """

    def __init__(self) -> None:
        self.values = torch.full((KEPT,), -math.inf, dtype=torch.float64)

    @property
    def full(self) -> bool:
        """Whether KEPT values were seen."""
        return float(self.values[-1]) > -math.inf

    def add(self, values: Tensor) -> None:
        """Takes in a few values."""
        # A negative zero plus zero is zero: which of the two comes first does not matter then.
        values = values.cpu().double() + 0.0
        self.values = torch.cat([self.values, values]).topk(KEPT).values

    def update(self, rows: Rows, *, negated: bool = False) -> None:
        """Takes in every value of `rows`, or the negative of every one.

        Args:
            rows: finite values.
            negated: whether the negatives are what is kept the largest of.
        """
        bound = float(self.values[-1])
        if (-rows.low if negated else rows.high) <= bound:
            return
        ends = -rows.lows if negated else rows.highs
        bound = _rounded_down(bound, ends.dtype)
        found = []
        chosen = (ends > bound).nonzero().flatten()
        if chosen.numel() >= KEPT:
            # That many rows hold a value of at least the new bound, so only values above it
            # matter, and where they are fewer than KEPT, values equal to it fill up.
            bound = float(ends[chosen].topk(KEPT).values[-1])
            chosen = (ends > bound).nonzero().flatten()
            found.append(ends.new_full((KEPT,), bound))
        for part in (rows.body.index_select(0, chosen).flatten(), rows.rest):
            values = -_wide(part) if negated else _wide(part)
            found.append(values[values > bound])
        self.add(torch.cat(found))


def _wide(x: Tensor) -> Tensor:
    """The same values, float64 for float64 and float32 for all else."""
    return x if x.dtype == torch.float64 else x.float()


def _rounded_down(value: float, dtype: torch.dtype) -> float:
    """The largest value of `dtype` that is not above a float64 value."""
    rounded = torch.tensor(value, dtype=dtype)
    if float(rounded) > value:
        rounded = rounded.nextafter(torch.tensor(-math.inf, dtype=dtype))
    return float(rounded)
