"""Codes to bytes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import FORMATS, NumberFormat


def some_codes(fmt: NumberFormat, shape: tuple[int, ...]) -> torch.Tensor:
    """All codes of the format in turn, in that shape."""
    count = int(torch.tensor(shape).prod())
    return fmt.encode(fmt.decode(fmt.encode(torch.arange(count) % 21 - 10.0))).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(
    name=st.sampled_from(list(FORMATS)),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    data=st.data(),
)
def test_any_shape_and_axis_comes_back(
    name: str, shape: tuple[int, ...], data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    fmt = FORMATS[name]
    codes = some_codes(fmt, shape)
    packed = fmt.pack(codes, axis)
    size = shape[axis]
    assert packed.shape[axis] == ((size + 1) // 2 if fmt.bits == 4 else size)
    assert packed.element_size() == 1
    assert same(fmt.unpack(packed, size, axis), codes)


@pytest.mark.parametrize(("name", "first"), [("int4", -8), ("float4_e2m1", 0), ("mxfp4_e2m1", 0)])
def test_every_pair_of_nibbles(name: str, first: int) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(first, first + 16).to(fmt.code_dtype)
    pairs = torch.cartesian_prod(codes, codes)
    packed = fmt.pack(pairs)
    assert packed.shape == (256, 1)
    assert len(packed.unique()) == 256
    assert same(fmt.unpack(packed, 2), pairs)


def test_the_even_index_is_in_the_low_nibble_and_odd_sizes_end_in_zero() -> None:
    codes = torch.tensor([1, -1, 7], dtype=torch.int8)
    assert FORMATS["int4"].pack(codes).tolist() == [0xF1, 0x07]
    transposed = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8)
    assert FORMATS["float4_e2m1"].pack(transposed, axis=0).tolist() == [[0x31, 0x42], [5, 6]]


@pytest.mark.parametrize("name", ["int4", "int8", "float4_e2m1", "hifloat8"])
def test_a_size_that_does_not_fit_is_refused(name: str) -> None:
    fmt = FORMATS[name]
    packed = fmt.pack(some_codes(fmt, (2, 10)))
    with pytest.raises(ArgumentValueError, match=r"size is 13; the packed .*along axis -1"):
        fmt.unpack(packed, 13)
