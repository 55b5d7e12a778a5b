"""IntFormat against its definition, written out in plain Python on exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from amct_pytorch.formats import INT8, IntFormat

BITS = st.integers(2, 16)
# float32 values over many magnitudes; beyond these a range's width leaves float32.
ENDS = st.floats(-(2.0**120), 2.0**120, width=32)
EPSILON = float(np.finfo(np.float32).eps)


def defined_scale(bits: int, lo: float, hi: float, symmetric: bool) -> Fraction:
    """The exact scale of the definition, before the zero-range rule."""
    lo, hi = Fraction(min(lo, 0.0)), Fraction(max(hi, 0.0))
    if not symmetric:
        return (hi - lo) / (2**bits - 1)
    return hi / (2 ** (bits - 1) - 1) if hi >= -lo else -lo / 2 ** (bits - 1)


def factors(bits: int, lo: float, hi: float, symmetric: bool) -> tuple[float, int]:
    scale, offset = IntFormat(bits).factors(torch.tensor(lo), torch.tensor(hi), symmetric=symmetric)
    assert scale.dtype == torch.float32
    assert offset.dtype == torch.int32
    return scale.item(), offset.item()


@given(bits=BITS, lo=ENDS, hi=ENDS, symmetric=st.booleans())
@example(bits=8, lo=0.0, hi=0.0, symmetric=False)
@example(bits=8, lo=0.0, hi=255 * 2.0**-23, symmetric=False)
@example(bits=8, lo=-127.0, hi=127.0, symmetric=True)
@example(bits=8, lo=-128.0, hi=127.0, symmetric=True)
def test_factors_follow_the_definition(bits: int, lo: float, hi: float, symmetric: bool) -> None:
    scale, offset = factors(bits, lo, hi, symmetric)
    exact = defined_scale(bits, lo, hi, symmetric)
    # One rounding of the width and one of the quotient, each half a float32 step at most;
    # the same error decides on which side of the threshold a scale at the threshold falls.
    near_threshold = abs(exact / Fraction(2.0**-23) - 1) < EPSILON
    empty = exact < Fraction(2.0**-23)
    if near_threshold:
        empty = scale == 1.0
    if empty:
        assert (scale, offset) == (1.0, 0 if symmetric else -(2 ** (bits - 1)))
        return
    assert abs(Fraction(scale) / exact - 1) <= EPSILON
    if symmetric:
        assert offset == 0
        return
    steps = Fraction(min(lo, 0.0)) / Fraction(scale)
    # lo / s is rounded to float32 before it is rounded to an integer, and s itself is off by
    # an epsilon: both move a tie by at most 2 * epsilon * |lo / s|.
    slack = abs(steps) * 2 * Fraction(EPSILON)
    low = -(2 ** (bits - 1))
    allowed = {low - round(steps - slack), low - round(steps + slack)}
    allowed = {min(max(o, low), -low - 1) for o in allowed}
    assert offset in allowed


@given(bits=BITS, lo=ENDS, hi=ENDS, symmetric=st.booleans())
def test_offset_is_in_range_and_zero_is_exact(
    bits: int, lo: float, hi: float, symmetric: bool
) -> None:
    fmt = IntFormat(bits)
    scale, offset = fmt.factors(torch.tensor([lo]), torch.tensor([hi]), symmetric=symmetric)
    assert fmt.qmin <= int(offset) <= fmt.qmax
    assert fmt.quantize(torch.zeros(1), scale, offset).item() == int(offset)
    assert fmt.fake_quantize(torch.zeros(1), scale, offset).item() == 0.0


@given(
    bits=BITS,
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    exponent=st.integers(-10, 10),
    offset=st.integers(-(2**15), 2**15 - 1),
)
@example(bits=4, values=[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5], exponent=0, offset=0)
def test_quantize_rounds_half_to_even_and_clips(
    bits: int, values: list[float], exponent: int, offset: int
) -> None:
    # A power of two as scale: x / s is exact, so ties are real ties and nothing else rounds.
    scale = 2.0**exponent
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    offset = min(max(offset, qmin), qmax)
    expected = [min(max(round(Fraction(v) / Fraction(scale)) + offset, qmin), qmax) for v in values]
    x, fmt = torch.tensor(values), IntFormat(bits)
    got = fmt.quantize(x, torch.tensor(scale), torch.tensor(offset, dtype=torch.int32))
    # round() of a Fraction is half to even. Beyond 2^24 a float32 sum may round, but clips.
    assert got.tolist() == expected
    by_inverse = fmt.quantize_by_inverse(x, torch.tensor(1 / scale), torch.tensor(offset))
    assert by_inverse.tolist() == expected
    assert torch.equal(x, torch.tensor(values)), "the argument was changed"


@given(
    bits=st.integers(2, 10),
    lo=st.floats(-1024, -(2.0**-10), width=32),
    hi=st.floats(2.0**-10, 1024, width=32),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    symmetric=st.booleans(),
)
def test_error_inside_the_range_is_at_most_half_a_step(
    bits: int, lo: float, hi: float, shares: list[float], symmetric: bool
) -> None:
    fmt = IntFormat(bits)
    scale, offset = fmt.factors(torch.tensor(lo), torch.tensor(hi), symmetric=symmetric)
    if symmetric and hi < -lo:
        hi = min(hi, float(scale) * fmt.qmax)
    x = torch.tensor([lo + s * (hi - lo) for s in shares]).clamp(lo, hi)
    error = (fmt.fake_quantize(x, scale, offset) - x).abs().max().item()
    # Asymmetric: lo and hi themselves are half a step off the grid at most, because the
    # offset is rounded, so a value there may be clipped by that half step. 1e-5: float32.
    assert error <= float(scale) * 0.5 * (1 + 1e-5) + 1e-5 * max(hi, -lo)


@given(bits=BITS, exponent=st.integers(-8, 8), data=st.data())
def test_every_integer_survives_dequantize_and_quantize(
    bits: int, exponent: int, data: st.DataObject
) -> None:
    fmt = IntFormat(bits)
    offset = data.draw(st.integers(fmt.qmin, fmt.qmax))
    codes = torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.float32)
    scale = torch.tensor(2.0**exponent * 1.1)
    real = fmt.dequantize(codes, scale, offset)
    assert torch.equal(fmt.quantize(real, scale, offset), codes)


def test_per_channel_factors_are_the_factors_of_each_channel() -> None:
    lo = torch.tensor([-3.0, 0.0, 0.5, -7.0])
    hi = torch.tensor([1.0, 2.0, 4.0, -2.0])
    for symmetric in (False, True):
        scale, offset = INT8.factors(lo, hi, symmetric=symmetric)
        single = [factors(8, a, b, symmetric) for a, b in zip(lo.tolist(), hi.tolist())]  # noqa: B905
        assert list(zip(scale.tolist(), offset.tolist(), strict=True)) == single
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    scale, offset = INT8.factors(lo, hi, symmetric=False)
    rows = [INT8.fake_quantize(x[i], scale[i], offset[i]) for i in range(4)]
    assert torch.equal(INT8.fake_quantize(x, scale[:, None], offset[:, None]), torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_quantize_as_float32_does_and_keep_their_dtype(dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 4, 1001).to(dtype)
    scale, offset = torch.tensor([0.0313]), torch.tensor([-3], dtype=torch.int32)
    expected = INT8.quantize(x.float(), scale, offset)
    for s, o in ((scale, offset), (scale[0], offset[0])):
        got = INT8.quantize(x, s, o)
        assert got.dtype == dtype
        assert INT8.fake_quantize(x, s, o).dtype == dtype
        # All of [-128, 127] is exact in bfloat16; x / s is rounded to its 8 bits first where
        # the scale is a scalar, which may move a value by one step.
        assert (got.float() - expected).abs().max() <= 1


@pytest.mark.parametrize(("bits", "storage"), [(4, 1), (8, 1), (9, 2), (16, 2)])
def test_storage_holds_every_value(bits: int, storage: int) -> None:
    fmt = IntFormat(bits)
    ends = torch.tensor([fmt.qmin, fmt.qmax])
    assert ends.to(fmt.code_dtype).tolist() == [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]
    assert fmt.code_dtype.itemsize == storage
    assert (fmt.name, fmt.record_name) == (f"int{bits}", f"INT{bits}")


@pytest.mark.parametrize("bits", [-1, 0, 1, 17])
def test_impossible_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}; allowed are 2 to 16"):
        IntFormat(bits)


def test_a_range_that_leaves_out_zero_is_extended_to_it() -> None:
    assert factors(8, 2.0, 5.1, False) == factors(8, 0.0, 5.1, False)
    assert factors(8, -5.1, -2.0, False) == factors(8, -5.1, 0.0, False)
    assert factors(8, -5.1, 0.0, False)[1] == 127
    assert math.isclose(factors(8, -5.1, 0.0, True)[0], 5.1 / 128, rel_tol=EPSILON)
