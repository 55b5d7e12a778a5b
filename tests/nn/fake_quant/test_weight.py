"""The quantizer of weights: scales, gradients, and weights that are dead or broken."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from amct_pytorch.algorithms.arq import arq_scale
from amct_pytorch.formats import IntFormat
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.fake_quant import WeightFakeQuant

LAYOUTS = {
    "conv": (WeightLayout(0), (6, 3, 3, 3)),
    "transposed, groups": (WeightLayout(1, 2), (4, 3, 3, 3)),
    "linear": (WeightLayout(0), (6, 5)),
}


def made(kind: str, **settings: object) -> tuple[WeightFakeQuant, torch.Tensor]:
    layout, shape = LAYOUTS[kind]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return WeightFakeQuant(6, layout, **settings), weight


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channel_wise", [True, False])
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_scales_start_as_arq_and_integers_are_those_of_the_forward(kind, bits, channel_wise, algo):
    quantizer, weight = made(kind, bits=bits, channel_wise=channel_wise, algo=algo)
    layout = LAYOUTS[kind][0]
    expected = arq_scale(weight, IntFormat(bits), layout, channel_wise=channel_wise)
    y = quantizer(weight)
    scale = quantizer.scale(weight)
    assert scale.shape == (6 if channel_wise else 1,)
    torch.testing.assert_close(scale, expected, rtol=2e-7, atol=0)
    along = layout.along_channels(scale, tuple(weight.shape))
    assert torch.equal(quantizer.integers(weight) * along, y)
    assert (y - weight).abs().max() <= along.max()
    assert torch.equal(quantizer.eval()(weight), y)


@pytest.mark.parametrize("channel_wise", [True, False])
def test_arq_passes_gradients_straight_through(channel_wise):
    quantizer, weight = made("conv", channel_wise=channel_wise)
    weight = weight.double().requires_grad_()
    seeds = torch.randn(weight.shape).double()
    (found,) = torch.autograd.grad(quantizer(weight), weight, seeds)
    assert torch.equal(found, seeds)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("channel_wise", [True, False])
def test_gradients_of_the_learned_scale_in_float64(kind, channel_wise):
    quantizer, weight = made(kind, channel_wise=channel_wise, algo="ulq_retrain", bits=4)
    quantizer(weight)
    quantizer.double()
    with torch.no_grad():
        quantizer.clip_max.mul_(0.6)  # so that some weights are beyond it
        quantizer.good_clip_max.copy_(quantizer.clip_max)
    weight = weight.double().requires_grad_()
    seeds = torch.randn(weight.shape).double()
    by_weight, by_clip = torch.autograd.grad(quantizer(weight), [weight, quantizer.clip_max], seeds)

    layout = LAYOUTS[kind][0]
    u = weight.detach() / layout.along_channels(quantizer.clip_max.detach() / 7, weight.shape)
    inside = (u >= -8) & (u <= 7)
    assert 0 < inside.double().mean() < 1
    share = torch.where(inside, u.round() - u, u.clamp(-8, 7))
    expected = layout.rows(seeds * share).sum(1) / 7
    expected = expected if channel_wise else expected.sum().reshape(1)
    torch.testing.assert_close(by_weight, seeds * inside)
    torch.testing.assert_close(by_clip, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broken", [math.nan, -1.0, 0.0, math.inf])
def test_a_learned_value_that_went_astray_is_put_back(broken):
    quantizer, weight = made("conv", algo="ulq_retrain")
    quantizer(weight)
    good = quantizer.scale(weight)
    with torch.no_grad():
        quantizer.clip_max[2] = broken
    assert torch.equal(quantizer.scale(weight), good)
    quantizer(weight)
    assert torch.equal(quantizer.clip_max, quantizer.good_clip_max)
    assert torch.equal(quantizer.scale(weight), good)


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_dead_channels_and_nan(algo):
    quantizer, weight = made("conv", algo=algo)
    weight[1] = 0
    weight[2] = 1e-12
    y = quantizer(weight)
    assert y.isfinite().all()
    assert (y[1] == 0).all()
    assert quantizer.scale(weight)[1] == 2.0**-23
    weight[3, 0, 0, 0] = math.nan
    y = quantizer(weight)
    assert y[[0, 1, 2, 4, 5]].isfinite().all()
    assert y[3].isnan().any()


def test_scales_that_must_not_be_smaller():
    quantizer, weight = made("conv")
    least = torch.zeros(6)
    least[4] = 1.0
    assert quantizer.scale(weight, least)[4] == 1
    assert torch.equal(quantizer(weight, least)[4], weight[4].round())


def test_the_state_says_whether_the_scale_has_started():
    first, weight = made("conv", algo="ulq_retrain")
    first(weight)
    with torch.no_grad():
        first.clip_max.mul_(1.5)
    second, _ = made("conv", algo="ulq_retrain")
    second.load_state_dict(first.state_dict())
    assert second.ready
    assert torch.equal(second(weight), first(weight))
    third = copy.deepcopy(made("conv", algo="ulq_retrain")[0])
    assert not third.ready
    third.eval()(weight)
    assert not third.ready
