"""Blocks of 32 and their power-of-two scales, against a slow reference."""

from __future__ import annotations

import math

import pytest
import torch
from rounding_reference import finite_numbers, nearest

from amct_pytorch.formats import (
    BLOCK_SIZE,
    FORMATS,
    Granularity,
    MicroscalingFormat,
    dequantize,
    fake_quantize,
    params_of,
    quantize,
)
from amct_pytorch.formats.e8m0 import decode_scale, encode_scale

NAMES = ["mxfp8_e4m3fn", "mxfp4_e2m1"]
BLOCKS = Granularity("group", BLOCK_SIZE)


def reference(block: list[float], fmt: MicroscalingFormat) -> tuple[float, list[float]]:
    """Scale and values of one block, both exponents tried, in float64 and Python."""
    exponent = math.floor(math.log2(max(abs(v) for v in block))) - fmt.largest_exponent
    numbers = finite_numbers(fmt)
    tried = []
    for e in (exponent, exponent + 1):
        steps = torch.tensor(block, dtype=torch.float64) / 2.0**e
        values = nearest(steps, numbers, half_to_even=True) * 2.0**e
        error = sum((a - b) ** 2 for a, b in zip(values.tolist(), block, strict=True))
        tried.append((error, 2.0**e, values.tolist()))
    _, scale, values_of_best = min(tried, key=lambda t: t[:2])
    return scale, values_of_best


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [32, 64, 45, 7])
def test_blocks_are_those_of_the_slow_reference(name: str, width: int) -> None:
    fmt = FORMATS[name]
    assert isinstance(fmt, MicroscalingFormat)
    generator = torch.Generator().manual_seed(width)
    # Few significant bits: the errors of both exponents are then exact in float32 too.
    x = torch.randn(24, width, generator=generator).to(torch.bfloat16).float()
    x *= 2.0 ** torch.randint(-20, 20, (24, 1), generator=generator)
    params = params_of(x, fmt, BLOCKS)
    got = fake_quantize(x, params.scale, params.offset, fmt, BLOCKS)
    codes = quantize(x, params.scale, None, fmt, BLOCKS)
    raised = 0
    for i, row in enumerate(x):
        for j, block in enumerate(row.split(BLOCK_SIZE)):
            scale, values = reference(block.tolist(), fmt)
            assert params.scale[i, j] == scale
            assert got[i, j * BLOCK_SIZE :][: len(block)].tolist() == values
            raised += scale > fmt.scale_for(block.abs().max())
    assert 0 < raised < params.scale.numel(), "both choices should have been made"
    assert torch.equal(
        dequantize(codes, decode_scale(encode_scale(params.scale)), None, fmt, BLOCKS), got
    )


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_nothing_and_of_no_number(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.zeros(4, 32)
    x[1, 3], x[2, 4], x[3, 5] = math.nan, -math.inf, 1.0
    scale = params_of(x, fmt, BLOCKS).scale
    assert encode_scale(scale)[:3, 0].tolist() == [127, 255, 255]
    out = fake_quantize(x, scale, None, fmt, BLOCKS)
    assert (out[0] == 0).all()
    assert out[1:3].isnan().all()
    assert torch.equal(out[3], x[3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exponent", [-149, -140, -127, 0, 126, 127])
def test_the_ends_of_float32_are_not_the_ends_of_the_blocks(name: str, exponent: int) -> None:
    fmt = FORMATS[name]
    x = torch.ldexp(torch.ones(1, 32, dtype=torch.float64), torch.tensor(exponent)).float()
    scale = params_of(x, fmt, BLOCKS).scale
    out = fake_quantize(x, scale, None, fmt, BLOCKS)
    # Below 2^-127 times the smallest element there is nothing but zero, and half of it.
    smallest = 2.0**-127 * float(finite_numbers(fmt).abs()[finite_numbers(fmt) != 0].min())
    assert torch.equal(out, x) or (float(x[0, 0]) < smallest and float(out.max()) <= smallest)


def test_every_scale_byte_is_that_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    scales = decode_scale(codes)
    theirs = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(scales[:255], theirs[:255])
    assert scales[255].isnan()
    assert torch.equal(encode_scale(scales), codes)
    assert encode_scale(torch.tensor([math.inf, 0.0, -1.0])).tolist() == [255, 255, 255]
