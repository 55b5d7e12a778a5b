"""quantize, dequantize and fake_quantize with every format and granularity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import (
    FORMATS,
    INT8,
    Granularity,
    IntFormat,
    dequantize,
    fake_quantize,
    params_of,
    quantize,
)

GRANULARITIES = [
    Granularity("tensor"),
    Granularity("channel"),
    Granularity("token"),
    Granularity("group", 32),
]


@given(
    name=st.sampled_from(list(FORMATS)),
    granularity=st.sampled_from(GRANULARITIES),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_and_fake_quantization_are_one_arithmetic(
    name: str,
    granularity: Granularity,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    symmetric: bool,
    seed: int,
) -> None:
    fmt = FORMATS[name]
    symmetric = symmetric or not isinstance(fmt, IntFormat)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = x.clone()
    params = params_of(x, fmt, granularity, symmetric=symmetric)
    assert params.scale.shape == granularity.scales_shape(shape)
    assert params.scale.dtype == torch.float32
    assert (params.offset is None) == symmetric
    codes = quantize(x, params.scale, params.offset, fmt, granularity)
    assert (codes.shape, codes.dtype) == (x.shape, fmt.code_dtype)
    stored = fmt.unpack(fmt.pack(codes), shape[-1])
    real = dequantize(stored, params.scale, params.offset, fmt, granularity)
    assert (real.shape, real.dtype) == (x.shape, torch.float32)
    fake = fake_quantize(x, params.scale, params.offset, fmt, granularity)
    assert fake.dtype == dtype
    assert torch.equal(real.to(dtype), fake)
    assert torch.equal(x, before), "the argument was changed"
    # Element by element: the scale of each, and the format's own rounding.
    scale = granularity.expand(params.scale, shape)
    if params.offset is None:
        assert torch.equal(real, fmt.round(x / scale) * scale)
        return
    offset = granularity.expand(params.offset, shape)
    assert isinstance(fmt, IntFormat)
    assert torch.equal(codes.double(), fmt.quantize(x / scale, torch.ones(1), offset).double())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_factors_are_those_of_the_format(bits: int, symmetric: bool) -> None:
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(3)) + 0.5
    x[2] = 0
    params = params_of(x, IntFormat(bits), Granularity("channel"), symmetric=symmetric)
    for i, row in enumerate(x):
        scale, offset = IntFormat(bits).factors(row.min(), row.max(), symmetric=symmetric)
        assert params.scale[i].item() == scale.item()
        assert (0 if params.offset is None else params.offset[i].item()) == offset.item()
    assert params.scale[2].item() == 1.0


@pytest.mark.parametrize("name", FORMATS)
def test_one_bad_value_is_seen_in_its_granule_only(name: str) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    clean = x.clone()
    x[1, 40] = math.nan
    for granularity, bad in (
        (Granularity("channel"), (1, slice(None))),
        (Granularity("group", 32), (1, slice(32, 64))),
    ):
        params = params_of(x, FORMATS[name], granularity)
        out = fake_quantize(x, params.scale, None, FORMATS[name], granularity)
        assert out[bad].isnan().all()
        good = params_of(clean, FORMATS[name], granularity)
        expected = fake_quantize(clean, good.scale, None, FORMATS[name], granularity)
        expected[bad] = math.nan
        assert torch.equal(out.nan_to_num(1e9), expected.nan_to_num(1e9))


def test_memory_layout_does_not_matter() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(5)).T
    for fmt in FORMATS.values():
        for granularity in GRANULARITIES:
            scale = params_of(x, fmt, granularity).scale
            assert torch.equal(scale, params_of(x.contiguous(), fmt, granularity).scale)
            got = fake_quantize(x, scale, None, fmt, granularity)
            assert torch.equal(got, fake_quantize(x.contiguous(), scale, None, fmt, granularity))


def test_wrong_factors_are_refused() -> None:
    x = torch.ones(4, 8)
    with pytest.raises(ArgumentValueError, match=r"scale has shape \(4,\); .* needs \(4, 1\)"):
        quantize(x, torch.ones(4), None, INT8, Granularity("channel"))
    with pytest.raises(ArgumentValueError, match=r"offset has shape \(\); .* needs \(1,\)"):
        quantize(x, torch.ones(1), torch.tensor(0), INT8, Granularity("tensor"))
    with pytest.raises(ArgumentValueError, match="an offset was given; hifloat8 has none"):
        quantize(x, torch.ones(1), torch.zeros(1), FORMATS["hifloat8"], Granularity("tensor"))
    with pytest.raises(ArgumentValueError, match="symmetric is False; mxfp4_e2m1 allows only True"):
        params_of(x, FORMATS["mxfp4_e2m1"], Granularity("group", 32), symmetric=False)
