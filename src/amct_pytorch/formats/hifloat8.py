"""HiFloat8: 8 bits whose exponent width is part of the code (arXiv 2409.16626, section 2).

A code is a sign, a prefix-coded dot field that gives the exponent's width D, an exponent in
sign-magnitude form whose leading magnitude bit is implied, and a mantissa in what is left:

===== === ===================== =============
dot   D   exponent E            mantissa bits
===== === ===================== =============
11    4   ±8 to ±15             1
10    3   ±4 to ±7              2
01    2   ±2, ±3                3
001   1   ±1                    3
0001  0   0                     3
0000  -   denormal: 2^(m - 23)  3 (m = 1 to 7)
===== === ===================== =============

Denormal with m = 0 is zero, and with the sign bit NaN; E = 15 with its mantissa bit is infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats.base import to_float32
from amct_pytorch.formats.floating import FloatFormat
from amct_pytorch.formats.lookup import LookupTable

NAN_CODE = 0x80
INFINITY_CODE = 0x6F

# What the dot fields are, and how many exponent bits follow each.
_DOT_FIELDS = {"11": 4, "10": 3, "01": 2, "001": 1, "0001": 0}
_DENORMAL = "0000"


def value_of(code: int) -> float:
    """The number that one code (0 to 255) stands for, by the format's definition."""
    if code == NAN_CODE:
        return math.nan
    sign = -1.0 if code & 0x80 else 1.0
    if code & 0x7F == INFINITY_CODE:
        return sign * math.inf
    bits = f"{code & 0x7F:07b}"
    if bits.startswith(_DENORMAL):
        m = int(bits.removeprefix(_DENORMAL), 2)
        return sign * 2.0 ** (m - 23) if m else 0.0
    dot, width = next((d, w) for d, w in _DOT_FIELDS.items() if bits.startswith(d))
    bits = bits.removeprefix(dot)
    exponent_field, mantissa = bits[:width], bits[width:]
    exponent = int("1" + exponent_field[1:], 2) if width else 0
    if exponent_field.startswith("1"):
        exponent = -exponent
    return sign * (1 + int(mantissa, 2) / (1 << len(mantissa))) * 2.0**exponent


# Rounding half away from zero looks at one bit below the last kept one. The longest mantissa has
# 3 bits, so float32's sign, exponent and upper 4 mantissa bits decide on the code.
_DECIDING_BITS = 13
_IGNORED_BITS = 32 - _DECIDING_BITS


def _deciding_bits(x: Tensor) -> Tensor:
    """The upper bits of float32 numbers, as integers from 0."""
    bits = x.contiguous().view(torch.int32) >> _IGNORED_BITS
    return bits & ((1 << _DECIDING_BITS) - 1)


def _codes_by_deciding_bits() -> Tensor:
    """The code (uint8) of all float32 numbers but NaN that share their deciding bits."""
    finite = sorted((c for c in range(0x80) if c != INFINITY_CODE), key=value_of)
    numbers = torch.tensor([value_of(c) for c in finite], dtype=torch.float64, device="cpu")
    midpoints = (numbers[:-1] + numbers[1:]) / 2
    upper = torch.arange(1 << (_DECIDING_BITS - 1), dtype=torch.int32, device="cpu")
    # The least number with these bits speaks for all, because no midpoint lies between them. A
    # midpoint itself goes up, away from zero.
    least = (upper << _IGNORED_BITS).view(torch.float32).double()
    nearest = torch.bucketize(least, midpoints, right=True)
    positive = torch.tensor(finite, device="cpu")[nearest]
    positive[least.isinf()] = INFINITY_CODE
    negative = torch.where(positive == 0, 0, positive | 0x80)
    return torch.cat((positive, negative)).to(torch.uint8)


_VALUES = LookupTable(torch.tensor([value_of(code) for code in range(256)], device="cpu"))
_CODES = LookupTable(_codes_by_deciding_bits())
_ROUNDED = LookupTable(_VALUES[_codes_by_deciding_bits()])


@dataclass(frozen=True)
class HiFloat8(FloatFormat):
    """HiFloat8, saturating: finite values beyond 2^15 are 2^15; infinity stays infinity.

    Rounding is half away from zero, as the paper's section on inference has it. What rounds to
    zero has no sign.
    """

    bits = 8
    name = "hifloat8"
    largest = 2.0**15
    # Below 16 there are three mantissa bits, at 2^15 none are left: the zone that values should
    # lie in ends here, and what is beyond is for outliers.
    reach = 16.0
    code_dtype = torch.uint8

    def round(self, x: Tensor) -> Tensor:
        """The nearest number, half away from zero, as float32; NaN and infinity stay."""
        x = to_float32(x)
        return _ROUNDED[_deciding_bits(x)].masked_fill_(x.isnan(), math.nan)

    def encode(self, x: Tensor) -> Tensor:
        """The codes (uint8) of ``round(x)``."""
        x = to_float32(x)
        return _CODES[_deciding_bits(x)].masked_fill_(x.isnan(), NAN_CODE)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32) of codes."""
        return _VALUES[codes]
