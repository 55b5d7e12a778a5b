"""Microscaling (OCP MX v1.0, section 5): small floats in blocks that share a power of two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats.e8m0 import BIAS, NAN_CODE, decode_scale
from amct_pytorch.formats.floating import FloatFormat

BLOCK_SIZE = 32


@dataclass(frozen=True)
class MicroscalingFormat(FloatFormat):
    """An element format whose scales are powers of two, one for each block of 32.

    Rounding, codes and packing are the element's. Scales are kept as float32 here and stored
    as one byte (`e8m0`).

    Attributes:
        element: the format of the elements.
    """

    element: FloatFormat

    @property
    def name(self) -> str:
        """The element's name with ``mxfp`` for ``float``."""
        return f"mxfp{self.element.name.removeprefix('float')}"

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Width of one packed element."""
        return self.element.bits

    @property
    def largest(self) -> float:
        """The element's largest finite number."""
        return self.element.largest

    @property
    def code_dtype(self) -> torch.dtype:
        """The element's."""
        return self.element.code_dtype

    @property
    def largest_exponent(self) -> int:
        """The exponent of `largest`: 8 for e4m3, 2 for e2m1."""
        return math.frexp(self.largest)[1] - 1

    def round(self, x: Tensor) -> Tensor:
        """As the element."""
        return self.element.round(x)

    def encode(self, x: Tensor) -> Tensor:
        """As the element."""
        return self.element.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        """As the element."""
        return self.element.decode(codes)

    def scale_for(self, magnitude: Tensor) -> Tensor:
        """2^(floor(log2 magnitude) - largest_exponent) (OCP MX v1.0, section 6.3).

        1 for zero; NaN, as E8M0 has it, for what is not finite; 2^-127 at least.
        """
        _, exponent = torch.frexp(magnitude)  # magnitude = m * 2^exponent with m in [0.5, 1)
        codes = (exponent - 1 - self.largest_exponent + BIAS).clamp(0, NAN_CODE - 1)
        codes = codes.where(magnitude != 0, BIAS).where(magnitude.isfinite(), NAN_CODE)
        return decode_scale(codes)

    def best_scale(self, rows: Tensor) -> Tensor:
        """The scale of each row by its largest magnitude, or twice it where the error is less.

        The larger one clips less and rounds more coarsely; the smaller one wins a tie.

        Args:
            rows: float32 [..., elements].

        Returns:
            float32 [...].
        """
        scale = self.scale_for(rows.abs().amax(dim=-1))
        # In units of the smaller scale; both are powers of two, so nothing is rounded here.
        steps = rows / scale[..., None]
        error = (self.round(steps) - steps).square_().sum(dim=-1)
        raised = (self.round(steps / 2).mul_(2) - steps).square_().sum(dim=-1)
        return torch.where(raised < error, scale * 2, scale)
