import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amct_pytorch.algorithms.smoothquant import (
    SmoothedLayer,
    choose_strength,
    smooth_factors,
)
from amct_pytorch.errors import ArgumentValueError

MAXIMA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


@given(MAXIMA, st.floats(0, 1), st.randoms())
def test_follows_the_formula(maxima, strength, random):
    weights = [random.uniform(1e-3, 10) for _ in maxima]
    found = smooth_factors(torch.tensor(maxima), torch.tensor(weights), strength)
    for x, w, s in zip(maxima, weights, found.tolist(), strict=True):
        assert s == pytest.approx(x**strength / w ** (1 - strength), rel=1e-4)


def test_channels_without_input_or_weights_become_no_outliers():
    x = torch.tensor([100.0, 4.0, 9.0, 0.0, 7.0, 0.0])
    w = torch.tensor([0.5, 1.0, 2.0, 30.0, 0.0, 0.0])
    s = smooth_factors(x, w, 0.5)
    smoothed_x, smoothed_w = x / s, w * s
    assert smoothed_w[3] == pytest.approx(float(smoothed_w[:3].median()), rel=1e-5)
    assert smoothed_x[4] == pytest.approx(float(smoothed_x[:3].median()), rel=1e-5)
    mean = math.exp(s[:3].log().mean())
    assert s[5] == pytest.approx(mean, rel=1e-5)
    assert smooth_factors(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_extreme_ratios_stay_finite(strength):
    s = smooth_factors(torch.tensor([1e38, 1e-30, 1.0]), torch.tensor([1e-30, 1e38, 1.0]), strength)
    assert bool((s.isfinite() & (s > 0)).all())
    assert bool((1 / s).isfinite().all())


def test_takes_the_strength_with_the_least_error():
    tokens, weight = torch.eye(4), torch.ones(3, 4)
    input_max = torch.tensor([1.0, 2.0, 3.0, 4.0])
    wanted = smooth_factors(input_max, torch.ones(4), 0.8)

    def output(factors):  # as if only the factors of 0.8 were exact
        return tokens @ weight.T + (factors - wanted).abs().sum()

    layers = [SmoothedLayer(tokens @ weight.T, output)]
    found = choose_strength(input_max, torch.ones(4), 0.5, layers)
    assert found.strength == pytest.approx(0.8)
    assert torch.equal(found.factors, wanted)
    assert found.error == 0 < found.error_asked


def test_errors_are_relative_to_each_token():
    """One token a thousand times larger than the rest, which only it is served by strength 1."""
    tokens = torch.cat([torch.full((1, 2), 1000.0), torch.ones(9, 2)])
    weight, ones = torch.ones(1, 2), torch.ones(2)
    input_max = torch.tensor([1000.0, 500.0])

    def output(factors):
        asked = torch.equal(factors, smooth_factors(input_max, ones, 0.5))
        noise = torch.ones(10, 1)
        noise[0] = 100.0 if asked else 0.0
        noise[1:] = 0.1 if asked else 0.2
        return tokens @ weight.T + noise

    layers = [SmoothedLayer(tokens @ weight.T, output)]
    assert choose_strength(input_max, ones, 0.5, layers).strength == 0.5


def test_without_tokens_the_strength_stays():
    layers = [SmoothedLayer(torch.zeros(0, 2), lambda _: 1 / 0)]
    assert choose_strength(torch.ones(4), torch.ones(4), 0.3, layers).strength == 0.3


def test_layers_that_share_an_input_decide_together():
    """One is served by strength 0.5 only, the other loses ten times as much by it."""
    meant, ones, input_max = torch.ones(3, 1), torch.ones(2), torch.tensor([4.0, 1.0])
    asked = smooth_factors(input_max, ones, 0.5)

    def first(factors):
        return meant + (0.0 if torch.equal(factors, asked) else 0.1)

    def second(factors):
        return meant + (1.0 if torch.equal(factors, asked) else 0.0)

    dead = SmoothedLayer(torch.zeros(3, 1), lambda factors: meant)
    layers = [SmoothedLayer(meant, first), SmoothedLayer(meant, second), dead]
    found = choose_strength(input_max, ones, 0.5, layers)
    assert found.strength == pytest.approx(0.6)
    assert found.error == pytest.approx(0.01 / 2)
    assert found.error_asked == pytest.approx(1 / 2)


def test_bad_input():
    with pytest.raises(ArgumentValueError, match=r"strength is 1\.5; allowed are 0 to 1"):
        smooth_factors(torch.ones(2), torch.ones(2), 1.5)
    with pytest.raises(ArgumentValueError, match="weight_max holds NaN"):
        smooth_factors(torch.ones(2), torch.full((2,), torch.nan), 0.5)
