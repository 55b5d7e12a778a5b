"""float8_e4m3fn: 4 exponent bits, 3 mantissa bits, no infinity (arXiv 2209.05433, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats.base import to_float32
from amct_pytorch.formats.floating import FloatFormat


@dataclass(frozen=True)
class Float8E4M3(FloatFormat):
    """torch's ``float8_e4m3fn``, saturating: everything beyond 448, infinity too, is 448.

    Rounding is half to even.
    """

    bits = 8
    name = "float8_e4m3fn"
    largest = 448.0
    code_dtype = torch.float8_e4m3fn

    def round(self, x: Tensor) -> Tensor:
        """The nearest number of the format, half to even, as float32; NaN stays NaN."""
        return self.encode(x).float()

    def encode(self, x: Tensor) -> Tensor:
        """``round(x)`` as ``float8_e4m3fn``."""
        # Whether torch's own cast saturates depends on its version and device: clamped first.
        return to_float32(x).clamp(-self.largest, self.largest).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """`codes` as float32."""
        return codes.float()
