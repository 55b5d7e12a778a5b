"""Factors that keep the error of outputs small, not that of weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from split_networks import DECOMPOSED, Net, image, trained
from test_split_layers import CASES
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.decomposition import solve
from amct_pytorch.decomposition.layer_data import batches_of, fit_outputs, input_metrics


@pytest.fixture(autouse=True)
def _set_up(tmp_path, monkeypatch):
    """A folder of its own; no layer left alone because it happened to be slower here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("amct_pytorch.flows.decomposition.measure", lambda *_: (2.0, 1.0))


def _skewed(seed: int, batch: int = 4) -> Tensor:
    """Images with a mean and smooth content, as real ones have: neighbours are correlated."""
    noise = torch.randn(batch, 3, 48, 40, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.avg_pool2d(noise, 7, 1, 3)
    return 1.0 + 3 * smooth + 0.1 * noise


def _output_errors(net: nn.Module, split: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = net(x)
        return float((split(x) - expected).norm() / expected.norm())


def test_outputs_on_other_data_are_far_closer_than_with_weights_alone():
    net = trained()
    plain = amct.auto_decomposition(copy.deepcopy(net))[0]
    data = [_skewed(seed) for seed in (1, 2)]
    split, changes = amct.auto_decomposition(
        copy.deepcopy(net), "net.json", calibration_data=data, input_data=_skewed(1)
    )
    held_out = _skewed(9)
    assert list(changes) == DECOMPOSED
    assert _output_errors(net, split, held_out) < 0.5 * _output_errors(net, plain, held_out)
    ledger = json.loads(Path("net_ledger.json").read_text())
    assert ledger["calibration_batches"] == 2
    for entry in ledger["layers"]:
        if entry["status"] == "decomposed":
            assert 0 < entry["output_error"] <= entry["output_error_unfitted"] < 1


def test_the_error_in_the_ledger_is_that_of_the_layer_on_the_data():
    conv = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    x = 1 + torch.randn(2, 64, 9, 10, generator=torch.Generator().manual_seed(0))
    expected = conv(x)
    split, changes = amct.auto_decomposition(
        copy.deepcopy(conv), "net.json", calibration_data=[x[:1], x[1:]]
    )
    assert list(changes) == ["0"]
    (entry,) = json.loads(Path("net_ledger.json").read_text())["layers"]
    error = float((split(x) - expected).detach().norm() / expected.detach().norm())
    assert entry["output_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_geometry_is_fitted_to_its_own_outputs(case):
    """With full rank the fit has nothing to do; with less it can only lower the error."""
    from amct_pytorch.decomposition.geometry import Geometry
    from amct_pytorch.decomposition.modules import build_pieces
    from amct_pytorch.decomposition.policy import RankPolicy

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(12, 16, **case))
    x = 1 + torch.randn(3, 12, 13, 14)
    batches = batches_of([x])
    (metric,) = input_metrics(net, batches, {"0": net[0]}).values()
    geometry = Geometry.of(net[0])
    policy = RankPolicy("flops", flops_ratio=0.7)
    found = solve.solve_layer(net[0].weight, geometry, policy, metric=metric)
    row = build_pieces(net[0], found.split, found.weights)
    with torch.no_grad():
        expected = net(x)

        def error() -> float:
            return float((row(x) - expected).norm() / expected.norm())

        before = error()
        (fit,) = fit_outputs(net, batches, {"0": row}).values()
        assert fit.error_before == pytest.approx(before, rel=1e-3)
        assert fit.error == pytest.approx(error(), rel=1e-3)
        assert fit.error < before


def test_large_sides_take_the_short_way(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    x = [1 + torch.randn(2, 64, 12, 12)]
    options = {"rank_policy": "flops", "flops_ratio": 0.3, "calibration_data": x}
    whole, _ = amct.auto_decomposition(copy.deepcopy(net), **options)
    monkeypatch.setattr(solve, "LARGE_SIDE", 100)
    short, _ = amct.auto_decomposition(copy.deepcopy(net), **options)
    errors = [_output_errors(net, split, x[0]) for split in (whole, short)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_model_and_random_state_are_kept(dtype):
    net = trained().to(dtype).train()
    statistics = copy.deepcopy(net.norm.state_dict())
    state = torch.get_rng_state()
    amct.auto_decomposition(
        net, rank_policy="energy", energy=0.97, calibration_data=[image().to(dtype)]
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    for key, value in net.norm.state_dict().items():
        assert torch.equal(value, statistics[key])
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in net.parameters())


def test_data_that_is_not_finite_leaves_the_factors_of_the_weights(caplog):
    net = nn.Sequential(nn.Conv2d(64, 64, 3))
    x = torch.full((1, 64, 20, 20), float("nan"))
    options = {"rank_policy": "flops", "flops_ratio": 0.3}
    plain, _ = amct.auto_decomposition(copy.deepcopy(net), **options)
    split, changes = amct.auto_decomposition(copy.deepcopy(net), calibration_data=[x], **options)
    if changes:
        assert "NaN or infinity" in caplog.text
        for a, b in zip(plain.state_dict().values(), split.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(1, 3, 48, 40), "calibration_data is a Tensor; allowed is a list"),
        (5, "calibration_data is a int"),
        ([], "calibration_data holds no batch"),
        ([torch.zeros(1, 3, 48, 40), 5], r"calibration_data\[1\] is a int"),
        (
            [torch.zeros(1, 3, 48, 40), torch.zeros(1, 4, 48, 40)],
            r"cannot be run on calibration_data\[1\]",
        ),
    ],
)
def test_wrong_data_is_explained(data, message):
    net = Net()
    before = list(net.state_dict())
    with pytest.raises(amct.AmctError, match=message):
        amct.auto_decomposition(net, "net.json", calibration_data=data)
    assert list(net.state_dict()) == before
