"""Rounding by its definition: the nearer neighbour in a sorted list, and a rule for ties."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amct_pytorch.formats import NumberFormat


def finite_numbers(fmt: NumberFormat) -> Tensor:
    """All finite numbers of a format of up to 8 bits, ascending, float64, zero once."""
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)
    if fmt.code_dtype in (torch.int8, torch.float8_e4m3fn):
        codes = codes.view(fmt.code_dtype)
    if fmt.name == "int4":
        codes = (codes & 15 ^ 8) - 8
    numbers = fmt.decode(codes).double()
    return torch.unique(numbers[numbers.isfinite()] + 0.0)


def nearest(x: Tensor, numbers: Tensor, *, half_to_even: bool) -> Tensor:
    """`x` (no NaN) rounded to the nearest of `numbers`, saturating; ties as told.

    Half to even: zero and every second number from it are even. Else ties go away from zero.
    """
    x = x.double()
    zero = int((numbers == 0).nonzero())
    below = (torch.searchsorted(numbers, x, right=True) - 1).clamp(0, len(numbers) - 2)
    middle = (numbers[below] + numbers[below + 1]) / 2  # float64 holds it exactly
    tie_up = ((below - zero) % 2 == 1) if half_to_even else x > 0
    up = (x > middle) | ((x == middle) & tie_up)
    return numbers[below + up.long()]


def critical_inputs(numbers: Tensor) -> Tensor:
    """float32 inputs that matter: numbers, midpoints, their neighbours, and bits of all kinds."""
    middles = (numbers[:-1] + numbers[1:]) / 2
    points = torch.cat((numbers, middles)).float()
    above = torch.nextafter(points, torch.tensor(math.inf))
    below = torch.nextafter(points, torch.tensor(-math.inf))
    # Every sign, exponent and upper mantissa, with lower bits of nothing, one, half and all.
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    patterns = torch.cat([(upper | low).view(torch.float32) for low in (0, 1, 0x8000, 0xFFFF)])
    return torch.cat((points, above, below, patterns[patterns.isfinite()]))
