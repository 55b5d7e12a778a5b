"""HFMG against its definition, step by step and integral by sum."""

import math

import pytest
import torch

from amct_pytorch.formats import INT8, IntFormat
from amct_pytorch.observers.hfmg import (
    STEPS,
    Density,
    density_errors,
    rebinned,
    search_window,
    windows,
)
from amct_pytorch.observers.histogram import Histogram


def observed(x):
    histogram = Histogram()
    histogram.update(x)
    return histogram


def slow_windows(counts):
    """The definition, one step at a time."""
    counts = [float(c) for c in counts]
    total, bins = sum(counts), len(counts)

    def given_up(values, steps):
        held, number = 0.0, 0
        while number < bins and held + values[number] <= steps * (total / STEPS):
            held += values[number]
            number += 1
        return number

    start, end, a, b, found = 0, bins, 0, 0, [(0, bins)]
    while a + b < STEPS:
        left = given_up(counts, a + 1)
        right = bins - given_up(counts[::-1], b + 1)
        if left - start > end - right:
            start, a = left, a + 1
        else:
            end, b = right, b + 1
        if end - start < bins / 4:
            break
        if found[-1] != (start, end):
            found.append((start, end))
    return found


@pytest.mark.parametrize("kind", ["normal", "one sided", "outlier", "gap"])
def test_windows_are_those_of_the_definition(kind):
    torch.manual_seed(0)
    x = torch.randn(3000)
    if kind == "one sided":
        x = x.abs()
    if kind == "outlier":
        x[0] = 40.0
    if kind == "gap":
        x = torch.cat([x, x + 50])
    counts = torch.histc(x.double(), 64)
    starts, ends = windows(counts)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == slow_windows(counts)


def test_errors_are_integrals_over_even_bins():
    torch.manual_seed(1)
    counts = torch.randint(0, 50, (32,)).double()
    density = Density(counts, -1.3, 0.125)
    fmt = IntFormat(4)
    lows = torch.tensor([-1.3, -0.8, -0.2, 0.0, -3.0])
    highs = torch.tensor([2.7, 1.1, 2.0, 0.4, 5.0])
    scale, offset = fmt.factors(lows, highs, symmetric=False)
    found = density_errors(density, fmt, scale, offset, math.inf)
    # A thousand values at even distances in each bin stand for its density.
    inside = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    points = (-1.3 + 0.125 * (torch.arange(32)[:, None] + inside)).flatten()
    weights = (counts / 1000).repeat_interleave(1000)
    for i in range(lows.numel()):
        error = points - fmt.fake_quantize(points, scale[i].double(), offset[i])
        assert float(found[i]) == pytest.approx(float(weights @ error.square()), rel=1e-4)


def test_candidates_that_cannot_win_are_not_scored():
    density = Density(torch.ones(64, dtype=torch.float64), 0.0, 1.0)
    scale, offset = INT8.factors(torch.zeros(2), torch.tensor([64.0, 16.0]), symmetric=False)
    every = density_errors(density, INT8, scale, offset, math.inf)
    some = density_errors(density, INT8, scale, offset, float(every[0]) * 2)
    assert some[0] == every[0]
    assert some[1] == math.inf


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_window_is_better_than_the_one_found(bits, symmetric):
    torch.manual_seed(2)
    x = torch.randn(20000).exp() - 0.5
    histogram, fmt = observed(x), IntFormat(bits)
    density = rebinned(histogram, 1024)
    assert float(density.counts.sum()) == pytest.approx(20000)
    starts, ends = windows(density.counts)
    lows = (histogram.low + density.width * starts).float()
    highs = (histogram.low + density.width * ends).float()
    scale, offset = fmt.factors(lows, highs, symmetric=symmetric)
    errors = density_errors(density, fmt, scale, offset, math.inf)
    i = int(errors.argmin())
    assert search_window(histogram, 1024, fmt, symmetric=symmetric) == (
        float(scale[i]),
        int(offset[i]),
    )
    # On the values themselves, clipping the long tail must pay at four bits.
    full_scale, full_offset = fmt.factors(lows[:1], highs[:1], symmetric=symmetric)
    found = (x - fmt.fake_quantize(x, scale[i], offset[i])).square().sum()
    full = (x - fmt.fake_quantize(x, full_scale, full_offset)).square().sum()
    assert found <= full * (1.01 if bits == 8 else 0.5)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-2.0], []])
def test_ranges_without_width(values):
    histogram = observed(torch.tensor(values))
    low, high = min([*values, 0.0]), max([*values, 0.0])
    scale, offset = INT8.factors(torch.tensor(low), torch.tensor(high), symmetric=False)
    found = search_window(histogram, 4096, INT8, symmetric=False)
    assert found == (float(scale), int(offset))
