"""Affine integers: q = clip(round(x / s) + o), x ~ (q - o) * s."""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats.base import NumberFormat, to_float32

# Below this a scale cannot be told from zero: the float32 machine epsilon.
SMALLEST_SCALE = 2.0**-23


@dataclass(frozen=True)
class IntFormat(NumberFormat):
    """A signed two's-complement integer of `bits` bits.

    Rounding is half to even, as in torch and ONNX; infinity goes to the end of the range. All
    methods work on any device and floating dtype. Those that take a scale return integer
    *values* in the input's dtype; `code_dtype` is what such values are stored in.

    Attributes:
        bits: 2 to 16.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; allowed are 2 to 16")

    @property
    def name(self) -> str:
        """The name that configs use, e.g. ``int8``."""
        return f"int{self.bits}"

    @property
    def record_name(self) -> str:
        """The name that records use, e.g. ``INT8``."""
        return f"INT{self.bits}"

    @property
    def largest(self) -> float:
        """The largest integer."""
        return float(self.qmax)

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """The torch dtype that holds one unpacked value."""
        return torch.int8 if self.bits <= 8 else torch.int16

    def round(self, x: Tensor) -> Tensor:
        """The nearest integer of the range, half to even, as float32; NaN stays NaN."""
        return torch.round(to_float32(x)).clamp_(self.qmin, self.qmax)

    def encode(self, x: Tensor) -> Tensor:
        """``round(x)`` as `code_dtype`; NaN, which integers lack, as 0."""
        # Casting NaN to an integer is undefined and differs between devices.
        return self.round(x).nan_to_num_(nan=0.0).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """`codes` as float32."""
        return codes.float()

    def unpack(self, packed: Tensor, size: int, axis: int = -1) -> Tensor:
        """As for every format; nibbles get their sign back."""
        codes = super().unpack(packed, size, axis)
        return (codes ^ 8) - 8 if self.bits <= 4 else codes

    def factors(self, lo: Tensor, hi: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Scale and offset that spread the integers over [lo, hi].

        Asymmetric: s = (hi - lo) / (2^b - 1), o = -round(lo / s) - 2^(b-1). Symmetric:
        s = |hi| / (2^(b-1) - 1) where |hi| >= |lo|, else |lo| / 2^(b-1), and o = 0. A
        scale below 2^-23 (an empty range) becomes 1, with o = -2^(b-1) when asymmetric.

        Args:
            lo: lower ends, any shape, floating; moved to 0 where above it.
            hi: upper ends, same shape; moved to 0 where below it.
            symmetric: whether the offset is fixed at 0.

        Returns:
            Scale (dtype of `lo`) and offset (int32), both of `lo`'s shape.
        """
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if symmetric:
            scale = torch.where(hi >= -lo, hi / self.qmax, lo / self.qmin)
            offset = torch.zeros_like(scale)
        else:
            scale = (hi - lo) / (self.qmax - self.qmin)
            offset = (self.qmin - torch.round(lo / scale)).clamp(self.qmin, self.qmax)
        empty = scale < SMALLEST_SCALE
        scale = torch.where(empty, torch.ones_like(scale), scale)
        nothing = torch.full_like(offset, 0 if symmetric else self.qmin)
        return scale, torch.where(empty, nothing, offset).to(torch.int32)

    def symmetric_scale(self, lo: float, hi: float) -> float:
        """The scale of `factors` for one range without an offset, by plain numbers.

        Dividing in float64 and rounding to float32 gives what dividing in float32 does, so the
        two agree to the last bit; on one range this is many times faster.

        Args:
            lo: lower end; a float32 value, as `hi`.
            hi: upper end. NaN or infinity in either gives one of the two.
        """
        scale = c_float(hi / self.qmax if hi >= -lo else lo / self.qmin).value
        return 1.0 if scale < SMALLEST_SCALE else scale

    def range_factors(self, lo: float, hi: float, *, symmetric: bool) -> tuple[float, int]:
        """`factors` of one range by plain numbers: many times faster, equal to the last bit.

        Args:
            lo: lower end; a finite float32 value, as `hi`.
            hi: upper end.
            symmetric: whether the offset is fixed at 0.
        """
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        if symmetric:
            return self.symmetric_scale(lo, hi), 0
        scale = c_float(c_float(hi - lo).value / (self.qmax - self.qmin)).value
        if scale < SMALLEST_SCALE:
            return 1.0, self.qmin
        # Python rounds half to even, as torch does.
        offset = self.qmin - round(c_float(lo / scale).value)
        return scale, min(max(offset, self.qmin), self.qmax)

    def reach(self, offset: int) -> int:
        """Largest |q - offset| of any integer q."""
        return max(self.qmax - offset, offset - self.qmin)

    def quantize(self, x: Tensor, scale: Tensor, offset: Tensor | int = 0) -> Tensor:
        """Integer values of `x`: clip(round(x / scale) + offset).

        Args:
            x: floating tensor of any shape.
            scale: positive, broadcastable to `x`.
            offset: integer, broadcastable to `x`.
        """
        q = (x / scale).round_().add_(offset).clamp_(self.qmin, self.qmax)
        return q.to(x.dtype)

    def quantize_by_inverse(self, x: Tensor, inverse_scale: Tensor, offset: Tensor) -> Tensor:
        """Like `quantize`, multiplying by 1/scale as the AscendQuant operator does.

        The result differs from a division only where the two products fall on different
        sides of a rounding boundary; simulation and deployment must agree there too.
        """
        return torch.round(x * inverse_scale).add_(offset).clamp_(self.qmin, self.qmax)

    def steps_by_inverse(self, x: Tensor, inverse_scale: float, offset: int) -> Tensor:
        """q - offset with q of `quantize_by_inverse`, for one scale and in one buffer, float32."""
        steps = torch.mul(x.float(), inverse_scale).round_()
        return steps.clamp_(self.qmin - offset, self.qmax - offset)

    def dequantize(self, q: Tensor, scale: Tensor, offset: Tensor | int = 0) -> Tensor:
        """The real values (q - offset) * scale that integer values stand for."""
        return (q - offset) * scale

    def fake_quantize(self, x: Tensor, scale: Tensor, offset: Tensor | int = 0) -> Tensor:
        """`x` after quantization and dequantization, in `x`'s dtype."""
        return self.dequantize(self.quantize(x, scale, offset), scale, offset).to(x.dtype)


INT8 = IntFormat(8)
