"""What is observed before clip values can start, and how that is kept in a state dict."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from amct_pytorch import processes
from amct_pytorch.formats import IntFormat
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.range_search import SearchSettings, search_range

# `fixed_min` as a number.
UNDECIDED = -1.0


@dataclass
class Start:
    """An unfinished observation; its memory does not grow.

    Attributes:
        histogram: of what was seen.
    """

    histogram: Histogram = field(default_factory=Histogram)

    def merged(self) -> Histogram:
        """What all processes have seen, the same in each; all of them call this."""
        result = Histogram()
        for histogram in processes.gathered(self.histogram):
            result.merge(histogram)
        return result

    @staticmethod
    def search(
        histogram: Histogram, number_format: IntFormat, *, symmetric: bool, from_zero: bool
    ) -> tuple[float, float]:
        """clip_max and clip_min of the range with the least error over what was seen."""
        scale, offset = search_range(
            histogram, SearchSettings(), number_format, symmetric=symmetric, from_zero=from_zero
        )
        high = (number_format.qmax - offset) * scale
        return high, -high if symmetric else (number_format.qmin - offset) * scale

    def packed(self, ready: bool, seen: int, fixed_min: bool | None) -> Tensor:
        """All of it and of the state around it, float64, on the CPU."""
        fixed = UNDECIDED if fixed_min is None else float(fixed_min)
        head = torch.tensor([float(ready), float(seen), fixed], dtype=torch.float64)
        if ready or self.histogram.total == 0:
            return head
        return torch.cat([head, self.histogram.packed()])

    @classmethod
    def unpacked(cls, state: Tensor) -> tuple[Start, bool, int, bool | None]:
        """The observation, `ready`, `seen` and `fixed_min` of which `state` came."""
        ready, seen, fixed = state[:3].tolist()
        start = cls(Histogram.unpacked(state[3:])) if state.numel() > 3 else cls()
        return start, bool(ready), int(seen), None if fixed == UNDECIDED else bool(fixed)
