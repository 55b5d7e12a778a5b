"""Split layers compute what the layer computed, whatever its shape, padding and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from amct_pytorch.decomposition.factorise import factorise
from amct_pytorch.decomposition.geometry import Geometry
from amct_pytorch.decomposition.modules import build_pieces
from amct_pytorch.decomposition.solve import as_matrix, as_pieces
from amct_pytorch.decomposition.tucker import cheapest_tucker

CASES = [
    {"kernel_size": 3, "stride": stride, "padding": padding, "bias": bias}
    for stride, padding, bias in itertools.product((1, 2, (2, 1)), (0, 1, (2, 0)), (True, False))
] + [
    {"kernel_size": (3, 5), "padding": "same"},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": (5, 4), "padding": "valid", "stride": (1, 2)},
    {"kernel_size": (7, 3), "padding": (3, 1), "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": (3, 4), "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": (5, 3), "padding": (2, 1), "padding_mode": "circular"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_at_full_rank_the_pieces_reproduce_the_layer(case, axis):
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 10, **case)
    x = torch.randn(2, 12, 13, 14)
    matrix = as_matrix(conv.weight.detach(), axis)
    rank = min(matrix.shape)
    left, right = factorise(matrix).factors(matrix, rank)
    geometry = Geometry.of(conv)
    weights = as_pieces(left, right, geometry, axis)
    row = build_pieces(conv, geometry.spatial(axis, rank), weights)
    expected = conv(x)
    assert row(x).shape == expected.shape
    assert (row(x) - expected).norm() <= 1e-5 * expected.norm()
    assert (row[0].bias is None, row[1].bias is None) == (True, conv.bias is None)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_tucker_pieces_reproduce_the_layer_at_full_rank(case):
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 10, **case)
    geometry = Geometry.of(conv)
    found = cheapest_tucker(conv.weight.detach(), geometry, 1e-4)
    row = build_pieces(conv, found.split, found.weights)
    x = torch.randn(2, 12, 13, 14)
    assert (row(x) - conv(x)).norm() <= 1e-5 * conv(x).norm()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_wide_layer_is_reproduced_at_full_rank(axis):
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 192, 3, padding=1)
    matrix = as_matrix(conv.weight.detach(), axis)
    left, right = factorise(matrix).factors(matrix, 384)
    geometry = Geometry.of(conv)
    row = build_pieces(conv, geometry.spatial(axis, 384), as_pieces(left, right, geometry, axis))
    x = torch.randn(1, 128, 9, 9)
    assert (row(x) - conv(x)).norm() <= 1e-5 * conv(x).norm()


def test_counted_multiplications_are_those_that_run():
    geometry = Geometry(64, 80, (3, 5), (2, 1))
    sizes = ((17, 16), (8, 16))  # padding (0, 2)
    assert geometry.macs(geometry.whole, sizes) == 80 * 64 * 15 * 8 * 16
    first, last = geometry.spatial(0, 32)
    assert geometry.macs((first, last), sizes) == 32 * 64 * 3 * 8 * 16 + 80 * 32 * 5 * 8 * 16
    first, last = geometry.spatial(1, 32)
    assert geometry.macs((first, last), sizes) == 32 * 64 * 5 * 17 * 16 + 80 * 32 * 3 * 8 * 16
    # Without sizes: one output position; rows that the stride skips later count double.
    assert geometry.macs(geometry.spatial(1, 32)) == 2 * 32 * 64 * 5 + 80 * 32 * 3
