"""What floating-point formats share: a scale from the largest magnitude, and no offset."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats.base import NumberFormat

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class FloatFormat(NumberFormat):
    """A floating-point format: symmetric about zero, scaled by a positive number."""

    @property
    def reach(self) -> float:
        """The number that scales take the largest magnitude of a tensor to."""
        return self.largest

    def factors(self, lo: Tensor, hi: Tensor, *, symmetric: bool = True) -> tuple[Tensor, Tensor]:
        """The scale that takes the larger magnitude of the range to `reach`, and zeros.

        s = max(|lo|, |hi|) / reach; where that is below the smallest normal float32, s = 1.

        Raises:
            ArgumentValueError: if not `symmetric`: floating-point formats have no offset.
        """
        if not symmetric:
            raise ArgumentValueError(f"symmetric is False; {self.name} allows only True")
        scale = self.scale_for(torch.maximum(lo.clamp(max=0).neg(), hi.clamp(min=0)))
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def scale_for(self, magnitude: Tensor) -> Tensor:
        """The scale for values of up to `magnitude` (not negative, any shape)."""
        scale = magnitude / self.reach
        return torch.where(scale < SMALLEST_NORMAL, torch.ones_like(scale), scale)
