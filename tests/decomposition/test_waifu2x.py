"""A trained super-resolution network, where the package that carries it is installed."""

from __future__ import annotations

import copy

import pytest
import real_models
import super_resolution
import torch
from evbmf_reference import evbmf_rank, truncation_error
from torch import nn

import amct_pytorch as amct
from amct_pytorch.decomposition import lanczos, solve
from amct_pytorch.decomposition.evbmf import evbmf
from amct_pytorch.decomposition.factorise import factorise
from amct_pytorch.decomposition.geometry import Geometry
from amct_pytorch.decomposition.policy import RankPolicy
from amct_pytorch.decomposition.solve import as_matrix


@pytest.fixture(scope="module")
def waifu2x() -> nn.Sequential:
    try:
        return super_resolution.waifu2x()
    except real_models.MissingAsset as error:
        pytest.skip(str(error))


def test_the_network_is_the_one_that_the_figures_are_about(waifu2x):
    pairs = super_resolution.photo_pairs(slice(0, 2), size=128)
    assert super_resolution.mean_psnr(waifu2x, pairs) > 27


def test_ranks_and_errors_of_its_layers_are_those_of_the_reference(waifu2x):
    for index in (6, 8, 10):
        for axis in (0, 1):
            matrix = as_matrix(waifu2x[index].weight.detach(), axis)
            found = factorise(matrix)
            assert evbmf(found.energies, *matrix.shape).rank == evbmf_rank(matrix.numpy())
            expected = truncation_error(matrix.numpy(), 64)
            assert found.error(64) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("index", [8, 10])
def test_its_leading_components_give_the_rank_and_error_of_the_reference(
    waifu2x, index, monkeypatch
):
    """The short way of large layers, on layers that are just large enough for it."""
    monkeypatch.setattr(solve, "LARGE_SIDE", 250)
    monkeypatch.setattr(lanczos, "BLOCK", 16)
    weight = waifu2x[index].weight.detach()
    geometry = Geometry.of(waifu2x[index])
    found = solve.solve_layer(weight, geometry, RankPolicy())
    assert not isinstance(found, str) and found.method == "lanczos float32"
    matrix = as_matrix(weight, solve.SPATIAL_MODES.index(found.mode)).numpy()
    assert found.estimate == evbmf_rank(matrix)
    assert found.error == pytest.approx(truncation_error(matrix, found.rank), abs=2e-5)


def test_flops_fall_by_more_than_what_is_asked_for(waifu2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, changes = amct.auto_decomposition(
        copy.deepcopy(waifu2x), rank_policy="flops", flops_ratio=0.65
    )
    assert list(changes) == ["6", "8", "10"]

    def weights(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters() if p.dim() == 4)

    # Stride 1 throughout: FLOPs go as weights.
    assert weights(waifu2x) / weights(model) >= 1.4
    x = torch.rand(1, 3, 30, 32)
    assert model(x).shape == waifu2x(x).shape
