"""The per-channel histogram against the values themselves, channel by channel."""

import pytest
import torch

from amct_pytorch.formats import INT8
from amct_pytorch.observers.channel_histogram import HALF_BINS, ChannelHistogram
from amct_pytorch.observers.range_search import SearchSettings

# Channels of very different sizes and shapes, one with an outlier, one of zeros.
SCALES = torch.tensor([1e-6, 0.01, 1.0, 3.0, 1000.0, 1.0, 0.0])


def values(number=3000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, len(SCALES), generator=generator) * SCALES
    x[:, 3] = x[:, 3].abs() + 0.5
    x[number // 2, 5] = 40.0
    return x


def observed(*parts):
    histogram = ChannelHistogram(len(SCALES))
    for part in parts:
        histogram.update(part)
    return histogram


def same(a, b):
    return (
        torch.equal(a._counts, b._counts)
        and torch.equal(a._exponent, b._exponent)
        and torch.equal(a.low, b.low)
        and torch.equal(a.high, b.high)
        and a.total == b.total
    )


def test_counts_are_those_of_the_values():
    x = values()
    histogram = observed(x)
    for i in range(len(SCALES)):
        bins = torch.floor(x[:, i].double() / histogram.widths[i]).long() + HALF_BINS
        assert torch.equal(
            histogram.channel(i).counts, torch.bincount(bins, minlength=2 * HALF_BINS)
        )
    assert torch.equal(histogram.low, x.double().amin(0))
    assert torch.equal(histogram.high, x.double().amax(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_neither_order_nor_batches_nor_merging_changes_anything(dtype):
    x = values().to(dtype)
    whole = observed(x.view(3, 1000, -1))
    assert same(whole, observed(*x[:40].split(1), x[40:]))
    assert same(whole, observed(x.flip(0)))
    a, b = observed(x[:1000] * 0.001), observed(x)
    left, right = observed(x[:1000] * 0.001), observed(x)
    left.merge(b)
    right.merge(a)
    assert same(left, right)
    assert same(left, observed(x[:1000] * 0.001, x))


def test_memory_does_not_grow_with_batches():
    histogram = observed(values(10))
    size = histogram._counts.numel()
    for seed in range(5):
        histogram.update(values(100, seed))
    assert histogram._counts.numel() == size == len(SCALES) * 2 * HALF_BINS


def error(x, scale, offset):
    return (INT8.fake_quantize(x, scale, offset) - x).double().square().sum(0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_is_as_good_as_trying_every_range_on_the_values(symmetric):
    x = values()
    scale, offset = observed(x).search(SearchSettings(), INT8, symmetric=symmetric)
    best = torch.full((x.shape[1],), torch.inf, dtype=torch.float64)
    for multiple in 0.7 + 0.01 * torch.arange(61):
        ends = x.amin(0), x.amax(0)
        low = ends[0] * multiple if symmetric else ends[0]
        factors = INT8.factors(low, ends[1] * multiple, symmetric=symmetric)
        best = torch.minimum(best, error(x, *factors))
    # Values are known to a bin only, an eighth of a step or less; candidates whose errors are
    # closer than that cannot be told apart.
    assert bool((error(x, scale, offset) <= best * 1.02 + 1e-30).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_window_search_is_not_worse_than_the_full_range(symmetric):
    x = values()
    scale, offset = observed(x).search_windows(1024, INT8, symmetric=symmetric)
    full = INT8.factors(x.amin(0), x.amax(0), symmetric=symmetric)
    # Values are spread evenly over bins of a quarter of a step or less.
    assert bool((error(x, scale, offset) <= error(x, *full) * 1.05 + 1e-30).all())


def test_percentile_starts_further_in_by_at_most_a_bin():
    x = values()
    settings = SearchSettings(max_percentile=0.9, min_percentile=0.9)
    histogram = observed(x)
    low, high = histogram.starting_points(settings)
    k = len(x) - int(0.9 * len(x))
    exact_high = x.topk(k, dim=0).values[-1].double().clamp(min=0)
    exact_low = -(-x).topk(k, dim=0).values[-1].double()
    assert bool(((high - exact_high >= 0) & (high - exact_high <= histogram.widths)).all())
    exact_low = exact_low.clamp(max=0)
    assert bool(((exact_low - low >= 0) & (exact_low - low <= histogram.widths)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_is_refused_and_nothing_counted(bad):
    x = values(10)
    histogram = observed(x)
    spoiled = x.clone()
    spoiled[3, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        histogram.update(spoiled)
    with pytest.raises(ValueError, match="3 channels after 7"):
        histogram.update(x[:, :3])
    assert same(histogram, observed(x))
