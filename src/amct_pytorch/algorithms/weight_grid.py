"""The numbers that a weight matrix may take: scales of granules, and rounding to them.

Matrices are transposed here, [K, N]: a row is one input channel of all N output channels, so
that algorithms that go through the input channels work on contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import Granularity, IntFormat, MicroscalingFormat, NumberFormat
from amct_pytorch.formats.quantizer import scale_from_range

# Fractions of a granule's range that are tried as its range. Halves and doubles are all that
# change a power of two.
SHRINKS = tuple(1 - 0.05 * i for i in range(11))
MX_SHRINKS = (1.0, 2.0, 0.5)


@dataclass(frozen=True)
class Factors:
    """Scales of one granule in each output channel.

    Attributes:
        scale: float32 [N], positive.
        offset: float32 [N] of integers; None for symmetric quantization.
    """

    scale: Tensor
    offset: Tensor | None = None


@dataclass(frozen=True)
class WeightGrid:
    """A number format, how its scales are shared, and whether there are offsets.

    Attributes:
        fmt: the number format.
        granularity: kind tensor, channel or group.
        symmetric: without offsets; False is for integers only.

    Raises:
        ArgumentValueError: on construction, for what is not allowed above.
    """

    fmt: NumberFormat
    granularity: Granularity
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.granularity.kind == "token":
            raise ArgumentValueError(
                "granularity is 'token'; allowed for weights are tensor, channel, group"
            )
        if not self.symmetric and not isinstance(self.fmt, IntFormat):
            raise ArgumentValueError(f"symmetric is False; {self.fmt.name} allows only True")

    def group_size(self, columns: int) -> int:
        """How many of `columns` input channels share a scale in one output channel."""
        size = self.granularity.group_size
        return columns if size is None else min(size, columns)

    def snap(self, target: Tensor, factors: Factors) -> Tensor:
        """The multiples of the scale that `target` is rounded to: decode(q) - o, float32."""
        steps = target / factors.scale
        if factors.offset is None:
            return self.fmt.round(steps)
        return self.fmt.round(steps.round_().add_(factors.offset)).sub_(factors.offset)

    def search(self, granule: Tensor, importance: Tensor) -> Factors:
        """Factors whose rounding error, weighted by input channel, is least over SHRINKS.

        Args:
            granule: float32 [k, N].
            importance: float32 [k], what a squared error costs in each input channel.
        """
        low, high = granule.amin(0), granule.amax(0)
        if self.granularity.kind == "tensor":
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        shrinks = MX_SHRINKS if isinstance(self.fmt, MicroscalingFormat) else SHRINKS
        best, least = self._spread(low, high), None
        for shrink in shrinks:
            tried = self._spread(low * shrink, high * shrink)
            error = self.snap(granule, tried).mul_(tried.scale).sub_(granule).square_()
            loss = importance @ error
            if self.granularity.kind == "tensor":
                loss = loss.sum().expand_as(loss)
            if least is None:
                best, least = tried, loss
                continue
            better = loss < least
            least = torch.where(better, loss, least)
            best = Factors(
                torch.where(better, tried.scale, best.scale),
                None
                if tried.offset is None or best.offset is None
                else torch.where(better, tried.offset, best.offset),
            )
        return best

    def _spread(self, low: Tensor, high: Tensor) -> Factors:
        params = scale_from_range(low, high, self.fmt, symmetric=self.symmetric)
        return Factors(params.scale, None if params.offset is None else params.offset.float())
