"""Every format of the configs, exhaustively: its codes, its rounding, its ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding_reference import critical_inputs, finite_numbers, nearest

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import FORMATS, IntFormat, NumberFormat

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
ANY = st.sampled_from(list(FORMATS.values()))
FLOATS = [fmt for fmt in FORMATS.values() if not isinstance(fmt, IntFormat)]
FLOAT32 = st.floats(width=32, allow_nan=False)


def every_code(fmt: NumberFormat) -> torch.Tensor:
    if isinstance(fmt, IntFormat):
        return torch.arange(fmt.qmin, fmt.qmax + 1).to(torch.int8)
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)
    return codes.view(fmt.code_dtype) if fmt.bits == 8 else codes


def test_the_names_are_those_of_the_configs() -> None:
    assert set(FORMATS) == {
        *("int4", "int8", "float8_e4m3fn", "float4_e2m1"),
        *("mxfp8_e4m3fn", "mxfp4_e2m1", "hifloat8"),
    }
    assert all(fmt.name == name for name, fmt in FORMATS.items())


@pytest.mark.parametrize(
    ("name", "bits", "largest", "smallest", "how_many"),
    [
        ("int4", 4, 7.0, 1.0, 16),
        ("int8", 8, 127.0, 1.0, 256),
        ("float8_e4m3fn", 8, 448.0, 2.0**-9, 253),
        ("mxfp8_e4m3fn", 8, 448.0, 2.0**-9, 253),
        ("float4_e2m1", 4, 6.0, 0.5, 15),
        ("mxfp4_e2m1", 4, 6.0, 0.5, 15),
        ("hifloat8", 8, 2.0**15, 2.0**-22, 253),
    ],
)
def test_ranges(name: str, bits: int, largest: float, smallest: float, how_many: int) -> None:
    fmt = FORMATS[name]
    numbers = finite_numbers(fmt)
    assert (fmt.bits, fmt.largest) == (bits, largest)
    assert (numbers.max(), numbers[numbers > 0].min()) == (largest, smallest)
    assert len(numbers) == how_many


@ALL
def test_every_code_survives_decode_and_encode(fmt: NumberFormat) -> None:
    codes = every_code(fmt)
    values = fmt.decode(codes)
    known = ~values.isnan()
    nans = {"float8_e4m3fn": 2, "mxfp8_e4m3fn": 2, "hifloat8": 1}
    assert int((~known).sum()) == nans.get(fmt.name, 0)
    again = fmt.encode(values)
    assert again.dtype == codes.dtype == fmt.code_dtype
    assert torch.equal(again[known].view(torch.uint8), codes[known].view(torch.uint8))
    assert torch.equal(fmt.round(values[known]), values[known])
    assert fmt.decode(again)[~known].isnan().all()


@ALL
def test_rounding_at_every_midpoint_and_beside_it(fmt: NumberFormat) -> None:
    numbers = finite_numbers(fmt)
    x = critical_inputs(numbers)
    expected = nearest(x, numbers, half_to_even=fmt.name != "hifloat8").float()
    assert torch.equal(fmt.round(x), expected)
    assert torch.equal(fmt.decode(fmt.encode(x)), expected)


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_round_as_their_float32_value(
    fmt: NumberFormat, dtype: torch.dtype
) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    assert fmt.round(x).dtype == torch.float32
    assert torch.equal(fmt.round(x), fmt.round(x.float()))
    assert torch.equal(fmt.decode(fmt.encode(x)), fmt.round(x))


@ALL
def test_float64_inputs_are_rounded_once(fmt: NumberFormat) -> None:
    numbers = finite_numbers(fmt)
    middles = (numbers[:-1] + numbers[1:]) / 2
    # So near a tie that float32 cannot tell, and beyond its range.
    up, down = (torch.nextafter(middles, torch.tensor(s * math.inf).double()) for s in (1, -1))
    far = torch.tensor([1e300, -1e300, 1e-300, -1e-300], dtype=torch.float64)
    x = torch.cat((up, down, middles, far))
    expected = nearest(x, numbers, half_to_even=fmt.name != "hifloat8").float()
    assert torch.equal(fmt.round(x), expected)
    assert torch.equal(fmt.decode(fmt.encode(x)), expected)
    assert fmt.round(torch.tensor([math.nan], dtype=torch.float64)).isnan().all()


@ALL
def test_nan_and_infinity(fmt: NumberFormat) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf])
    # A NaN that differs from infinity in its lowest bit only.
    payload = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert fmt.round(torch.cat((x[:1], payload))).isnan().all()
    top, bottom = math.inf, -math.inf
    if fmt.name != "hifloat8":
        top, bottom = fmt.largest, finite_numbers(fmt)[0].item()
    assert fmt.round(x)[1:].tolist() == [top, bottom]
    assert fmt.decode(fmt.encode(x))[1:].tolist() == [top, bottom]
    has_nan = fmt.name in ("float8_e4m3fn", "mxfp8_e4m3fn", "hifloat8")
    coded = fmt.decode(fmt.encode(torch.cat((x[:1], payload))))
    assert coded.isnan().all() if has_nan else (coded == 0).all()


@given(fmt=ANY, values=st.lists(FLOAT32, min_size=1, max_size=20))
def test_rounding_is_idempotent_monotone_and_odd(fmt: NumberFormat, values: list[float]) -> None:
    x = torch.tensor(values).sort().values
    rounded = fmt.round(x)
    assert torch.equal(fmt.round(rounded), rounded)
    assert (rounded[1:] >= rounded[:-1]).all()
    assert torch.equal(fmt.decode(fmt.encode(x)), rounded)
    if fmt in FLOATS:
        assert torch.equal(fmt.round(-x), -rounded)


@given(fmt=ANY, share=st.floats(-1, 1, width=32), exponent=st.integers(-30, 15))
def test_no_number_of_the_format_is_nearer(fmt: NumberFormat, share: float, exponent: int) -> None:
    x = torch.tensor([share * 2.0**exponent])
    numbers = finite_numbers(fmt)
    error = (fmt.round(x).double() - x.double()).abs()
    assert error <= (numbers - x.double()).abs().min()


def test_torch_agrees_about_float8() -> None:
    fmt = FORMATS["float8_e4m3fn"]
    x = critical_inputs(finite_numbers(fmt))
    x = x[x.abs() <= 448]
    assert torch.equal(fmt.encode(x).view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
    zero = torch.tensor([0.0, -0.0])
    assert fmt.encode(zero).view(torch.uint8).tolist() == [0, 0x80]


def test_the_table_of_float4() -> None:
    fmt = FORMATS["float4_e2m1"]
    values = fmt.decode(torch.arange(16).to(torch.uint8)).tolist()
    assert values == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fmt.round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_the_codes_of_hifloat8() -> None:
    fmt = FORMATS["hifloat8"]
    # One code of each kind, by hand from the paper's fields: sign, dot, exponent, mantissa.
    known = {
        0b0_0000_000: 0.0,
        0b0_0000_001: 2.0**-22,
        0b1_0000_111: -(2.0**-16),
        0b0_0001_000: 1.0,
        0b0_0001_101: 1.625,
        0b0_001_0_000: 2.0,
        0b0_001_1_111: 0.9375,
        0b0_01_00_001: 4.5,
        0b1_01_11_010: -(2.0**-3) * 1.25,
        0b0_10_000_01: 20.0,
        0b0_10_111_11: 2.0**-7 * 1.75,
        0b0_11_0000_1: 384.0,
        0b0_11_0111_0: 2.0**15,
        0b1_11_1111_1: -(2.0**-15) * 1.5,
        0x6F: math.inf,
        0xEF: -math.inf,
    }
    codes = torch.tensor(list(known), dtype=torch.uint8)
    assert fmt.decode(codes).tolist() == list(known.values())
    assert fmt.decode(torch.tensor([0x80], dtype=torch.uint8)).isnan().all()
    mantissas = {
        **dict.fromkeys(range(-3, 4), 8),
        **dict.fromkeys((*range(4, 8), *range(-7, -3)), 4),
    }
    mantissas |= dict.fromkeys((*range(8, 15), *range(-15, -7)), 2)
    mantissas |= {15: 1, **dict.fromkeys(range(-22, -15), 1)}
    positive = finite_numbers(fmt)
    exponents = torch.frexp(positive[positive > 0])[1] - 1
    found = {int(e): int((exponents == e).sum()) for e in exponents.unique()}
    assert found == mantissas


def test_what_hifloat8_rounds_to_zero_is_the_one_zero() -> None:
    fmt = FORMATS["hifloat8"]
    x = torch.tensor([0.0, -0.0, 2.0**-24, -(2.0**-24), -(2.0**-149)])
    assert fmt.encode(x).tolist() == [0] * 5
    assert not fmt.round(x).signbit().any()
    assert fmt.round(torch.tensor([2.0**-23, -(2.0**-23)])).tolist() == [2.0**-22, -(2.0**-22)]
    assert fmt.round(torch.tensor([3e38, -3e38, 32769.0])).tolist() == [2**15, -(2**15), 2**15]


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_floats_have_no_offset(fmt: NumberFormat) -> None:
    with pytest.raises(ArgumentValueError, match=f"symmetric is False; {fmt.name} allows only"):
        fmt.factors(torch.tensor([-1.0]), torch.tensor([2.0]), symmetric=False)


@pytest.mark.parametrize(
    ("name", "lo", "hi", "scale"),
    [
        ("float8_e4m3fn", -3.0, 2.0, 3 / 448),
        ("float8_e4m3fn", 1.0, 2.0, 2 / 448),
        ("float8_e4m3fn", 0.0, 1e-6, 1e-6 / 448),  # small, but not nothing
        ("float4_e2m1", -3.0, 12.0, 2.0),
        ("hifloat8", -4.0, 1.0, 4 / 16),
        ("hifloat8", 0.0, 0.0, 1.0),
        ("float4_e2m1", -1e-38, 0.0, 1.0),
        ("mxfp8_e4m3fn", -3.0, 0.0, 2.0**-7),
        ("mxfp4_e2m1", 0.0, 7.99, 1.0),
        ("mxfp4_e2m1", 0.0, 8.0, 2.0),
        ("mxfp4_e2m1", 0.0, 0.0, 1.0),
        ("mxfp4_e2m1", 0.0, 2.0**-149, 2.0**-127),
    ],
)
def test_scales_of_floats(name: str, lo: float, hi: float, scale: float) -> None:
    got, offset = FORMATS[name].factors(torch.tensor([lo]), torch.tensor([hi]), symmetric=True)
    assert got.item() == torch.tensor(scale).item()
    assert (offset.item(), offset.dtype) == (0, torch.int32)
