"""float4_e2m1: 2 exponent bits, 1 mantissa bit (OCP MX v1.0, section 5.3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats.base import to_float32
from amct_pytorch.formats.floating import FloatFormat
from amct_pytorch.formats.lookup import LookupTable

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = LookupTable(torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], device="cpu"))


@dataclass(frozen=True)
class Float4E2M1(FloatFormat):
    """±{0, 0.5, 1, 1.5, 2, 3, 4, 6}, saturating: everything beyond 6, infinity too, is 6.

    Rounding is half to even. The code is sign, then the magnitude's index; there is no NaN.
    """

    bits = 4
    name = "float4_e2m1"
    largest = 6.0
    code_dtype = torch.uint8

    def round(self, x: Tensor) -> Tensor:
        """The nearest number of the format, half to even, as float32; NaN stays NaN."""
        x = to_float32(x).clamp(-self.largest, self.largest)
        magnitude = x.abs()
        # The distance of neighbours: 0.5 below 2, 1 below 4, 2 above. In these units an even
        # mantissa is an even number, so rounding half to even there is the format's rule.
        step = 0.5 + 0.5 * (magnitude >= 2) + 1.0 * (magnitude >= 4)
        return torch.round(x / step).mul_(step)

    def encode(self, x: Tensor) -> Tensor:
        """``round(x)`` as uint8, 0 to 15; NaN as 0."""
        values = self.round(x).nan_to_num_(nan=0.0)
        magnitude = values.abs()
        # Codes count halves up to 2, ones from there to 4, twos above.
        index = magnitude.clamp(max=2) * 2
        index += magnitude.clamp(2, 4) - 2
        index += (magnitude.clamp(min=4) - 4) / 2
        return index.to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32) of codes 0 to 15."""
        return _VALUES[codes]
