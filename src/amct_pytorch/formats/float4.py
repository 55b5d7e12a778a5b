"""float4_e2m1: 2 exponent bits, 1 mantissa bit (OCP MX v1.0, section 5.3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats.base import to_float32
from amct_pytorch.formats.floating import FloatFormat
from amct_pytorch.formats.lookup import LookupTable

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Sign, exponent and first mantissa bit of float32: what tells the format's numbers apart.
_TELLING_BITS = 10


def _telling_bits(values: Tensor) -> Tensor:
    return (values.view(torch.int32) >> (32 - _TELLING_BITS)) & ((1 << _TELLING_BITS) - 1)


def _codes_by_telling_bits(values: Tensor) -> Tensor:
    """The index (uint8) of each of `values` by its telling bits; 0 elsewhere, so for NaN too."""
    codes = torch.zeros(1 << _TELLING_BITS, dtype=torch.uint8, device="cpu")
    codes[_telling_bits(values)] = torch.arange(16, dtype=torch.uint8, device="cpu")
    return codes


_NUMBERS = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], device="cpu")
_VALUES = LookupTable(_NUMBERS)
_CODES = LookupTable(_codes_by_telling_bits(_NUMBERS))


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
        return _CODES[_telling_bits(self.round(x))]

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32) of codes 0 to 15."""
        return _VALUES[codes]
