"""The range of each input channel of a layer over batches."""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelRange:
    """Smallest and largest value of each channel; 0 always lies between them.

    Args:
        channels: K, the size of the input's last axis.
        device: where inputs are.

    Attributes:
        lo: float32 [K], at most 0.
        hi: float32 [K], at least 0.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.lo = torch.zeros(channels, device=device)
        self.hi = torch.zeros(channels, device=device)

    def add(self, x: Tensor) -> None:
        """Takes in one batch [..., K]; an empty one changes nothing."""
        rows = x.detach().reshape(-1, len(self.lo))
        if len(rows):
            self.lo = torch.minimum(self.lo, rows.amin(0).float())
            self.hi = torch.maximum(self.hi, rows.amax(0).float())

    def merge(self, other: ChannelRange) -> None:
        """Takes in what `other` has seen."""
        self.lo = torch.minimum(self.lo, other.lo.to(self.lo.device))
        self.hi = torch.maximum(self.hi, other.hi.to(self.hi.device))

    @property
    def magnitude(self) -> Tensor:
        """max |x| of each channel, float32 [K]."""
        return torch.maximum(-self.lo, self.hi)
