"""Which elements share a scale, against loops over the elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import Granularity

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
GRANULARITIES = st.one_of(
    st.sampled_from([Granularity("tensor"), Granularity("channel"), Granularity("token")]),
    st.integers(1, 6).map(lambda size: Granularity("group", size)),
)


def granule_of(index: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Where in the scales the scale of one element is."""
    if granularity.kind == "tensor":
        return (0,)
    if granularity.kind == "channel":
        return (index[0], *(0 for _ in index[1:]))
    if granularity.group_size is None:
        return (*index[:-1], 0)
    return (*index[:-1], index[-1] // granularity.group_size)


@given(shape=SHAPES, granularity=GRANULARITIES)
def test_reduce_expand_and_rows_agree_with_the_definition(
    shape: tuple[int, ...], granularity: Granularity
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scales = granularity.scales_shape(shape)
    expected = torch.zeros(scales)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)):
        at = tuple(index.tolist())
        to = granule_of(at, granularity)
        expected[to] = max(expected[to], x[at].abs())
    largest = granularity.reduce(x.abs(), torch.amax)
    assert torch.equal(largest, expected)
    wide = granularity.expand(largest, shape)
    assert wide.shape == shape
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)):
        at = tuple(index.tolist())
        assert wide[at] == expected[granule_of(at, granularity)]
    rows = granularity.rows(x)
    assert rows.shape[:-1].numel() == largest.numel()
    assert torch.equal(granularity.from_rows(rows, shape), x)


def test_shapes_of_weights_and_activations() -> None:
    channel, group, token = Granularity("channel"), Granularity("group", 32), Granularity("token")
    assert Granularity("tensor").scales_shape((8, 70)) == (1,)
    assert channel.scales_shape((8, 70)) == (8, 1)
    assert channel.scales_shape((8, 3, 5, 5)) == (8, 1, 1, 1)
    assert group.scales_shape((8, 70)) == (8, 3)
    assert group.scales_shape((2, 7, 64)) == (2, 7, 2)
    assert token.scales_shape((2, 7, 64)) == (2, 7, 1)


def test_a_short_last_group_is_filled_with_zeros() -> None:
    x = torch.full((1, 5), -2.0)
    group = Granularity("group", 3)
    assert group.reduce(x, torch.amax).tolist() == [[-2, 0]]
    assert group.reduce(x, torch.sum).tolist() == [[-6, -4]]


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("chanel", None, r"granularity is 'chanel'; allowed are tensor, .*did you mean 'channel'"),
        ("group", None, "group_size is None; allowed are 1 and above"),
        ("group", 0, "group_size is 0; allowed are 1 and above"),
        ("tensor", 32, "group_size is 32; only granularity 'group' has one"),
    ],
)
def test_wrong_granularities_are_refused(kind: str, size: int | None, message: str) -> None:
    with pytest.raises(ArgumentValueError, match=message):
        Granularity(kind, size)  # type: ignore[arg-type]
