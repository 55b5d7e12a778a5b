"""The streaming histogram against numpy, in any order and split, bit for bit."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amct_pytorch.observers.histogram import HALF_BINS, SMALLEST_EXPONENT, Histogram
from amct_pytorch.observers.tails import KEPT

GENERATOR_SEEDS = st.integers(0, 2**31)


def histogram_of(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def state(histogram: Histogram) -> tuple[object, ...]:
    return (
        histogram._exponent,
        histogram._inner.numpy().tobytes(),
        histogram._largest.values.numpy().tobytes(),
        histogram._smallest.values.numpy().tobytes(),
        histogram.counts.numpy().tobytes(),
        histogram.low,
        histogram.high,
        histogram.total,
        histogram.width,
    )


def brute_force(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Counts and width by the definition in the class's docstring, in float64."""
    values = values.astype(np.float64).ravel()
    largest = np.abs(values).max()
    exponent = math.frexp(largest)[1]
    width = math.ldexp(1.0, exponent) / HALF_BINS
    index = np.floor(values / width).astype(np.int64) + HALF_BINS
    return np.bincount(index, minlength=2 * HALF_BINS), width


@st.composite
def batches(draw: st.DrawFn) -> list[torch.Tensor]:
    """A few batches of magnitudes that differ by up to 2^60, some one-sided or all zero."""
    generator = torch.Generator().manual_seed(draw(GENERATOR_SEEDS))
    found = []
    for _ in range(draw(st.integers(2, 4))):
        x = torch.randn(draw(st.integers(1, 200)), generator=generator)
        x *= 2.0 ** draw(st.integers(-30, 30))
        kind = draw(st.sampled_from(["both", "positive", "negative", "zero"]))
        found.append({"both": x, "positive": x.abs(), "negative": -x.abs(), "zero": x * 0}[kind])
    return found


@given(data=batches())
@settings(max_examples=60)
def test_counts_are_those_of_numpy(data: list[torch.Tensor]) -> None:
    everything = torch.cat(data).numpy()
    histogram = histogram_of(*data)
    assert histogram.low == everything.min()
    assert histogram.high == everything.max()
    assert histogram.total == everything.size
    if not everything.any():
        assert int(histogram.counts[HALF_BINS]) == everything.size
        return
    counts, width = brute_force(everything)
    assert histogram.width == width
    assert np.array_equal(histogram.counts.numpy(), counts)


@given(data=batches(), cut=st.integers(0, 4))
@settings(max_examples=40)
def test_order_split_and_merging_change_nothing(data: list[torch.Tensor], cut: int) -> None:
    expected = state(histogram_of(torch.cat(data)))
    for order in list(permutations(data))[:6]:
        assert state(histogram_of(*order)) == expected
    for left, right in ((data[:cut], data[cut:]), (data[cut:], data[:cut])):
        merged = histogram_of(*left)
        merged.merge(histogram_of(*right))
        assert state(merged) == expected


def test_merge_leaves_the_other_histogram_alone() -> None:
    one, other = histogram_of(torch.tensor([5.0])), histogram_of(torch.tensor([0.1]))
    before = state(other)
    one.merge(other)
    one.update(torch.tensor([0.1, 9.0]))
    assert state(other) == before


@pytest.mark.parametrize("small", [0.0, 1e-30, -1e-20, 2.0**-125])
@pytest.mark.parametrize("large", [1.0, 1e30, -1e38])
def test_range_growth_from_a_tiny_first_batch(small: float, large: float) -> None:
    first, second = torch.full((7,), small), torch.tensor([large, large / 3])
    histogram = histogram_of(first, second)
    counts, width = brute_force(torch.cat([first, second]).numpy())
    assert histogram.width == width
    assert np.array_equal(histogram.counts.numpy(), counts)
    assert state(histogram_of(second, first)) == state(histogram)


@pytest.mark.parametrize("value", [2.0**-140, -(2.0**-149), 2.0**-126, 2.0**-115])
def test_values_next_to_nothing_are_counted(value: float) -> None:
    histogram = histogram_of(torch.tensor([value, value, 0.0]))
    assert int(histogram.counts.sum()) == 3
    below = int(histogram.counts[:HALF_BINS].sum())
    assert below == (2 if value < 0 else 0)
    assert (histogram.low, histogram.high) == (min(value, 0.0), max(value, 0.0))


def test_negative_zero_counts_as_zero() -> None:
    histogram = histogram_of(torch.tensor([-0.0, 1.0]), torch.tensor([-0.0, -1.0]))
    assert int(histogram.counts[HALF_BINS]) == 2


def test_powers_of_two_fall_into_the_bin_they_begin() -> None:
    histogram = histogram_of(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    # The range is [-2, 2): 1 is exactly halfway.
    bins = histogram.counts.nonzero().flatten().tolist()
    half, quarter = HALF_BINS // 2, HALF_BINS // 4
    assert bins == [HALF_BINS - half, HALF_BINS - quarter, HALF_BINS + quarter, HALF_BINS + half]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_count_the_values_they_hold(dtype: torch.dtype) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3)).to(dtype)
    counts, width = brute_force(x.double().numpy())
    histogram = histogram_of(x)
    assert histogram.width == width
    assert np.array_equal(histogram.counts.numpy(), counts)


def test_float64_just_below_a_power_of_two() -> None:
    # Rounded to float32 this is 1.0, one bin further than there are.
    x = torch.tensor([1 - 2.0**-40, -1 + 2.0**-40], dtype=torch.float64)
    histogram = histogram_of(x)
    assert histogram.counts.nonzero().flatten().tolist() == [0, 2 * HALF_BINS - 1]


def test_non_contiguous_input() -> None:
    x = torch.randn(20, 30, 40, generator=torch.Generator().manual_seed(0))
    expected = state(histogram_of(x))
    assert state(histogram_of(x.permute(2, 0, 1))) == expected
    assert state(histogram_of(x[::2], x[1::2])) == expected
    assert state(histogram_of(x.expand(2, 20, 30, 40))) == state(histogram_of(x, x))


def test_more_than_2_to_the_24_values_in_one_bin() -> None:
    # float32 counts stop at 2^24; 17 million values of one float16 are 34 MB.
    number = 2**24 + 12345
    histogram = histogram_of(torch.zeros(number, dtype=torch.float16), torch.ones(3))
    assert int(histogram.counts[HALF_BINS]) == number
    assert histogram.total == number + 3
    assert histogram.kth_largest(4) <= histogram.width
    for _ in range(10):
        histogram.merge(histogram_of_counts(histogram))
    assert int(histogram.counts[HALF_BINS]) == number * 2**10


def histogram_of_counts(histogram: Histogram) -> Histogram:
    """A copy, to merge a histogram with itself."""
    copy = Histogram()
    copy.merge(histogram)
    return copy


def test_empty_tensors_count_nothing() -> None:
    histogram = histogram_of(torch.empty(0), torch.empty(3, 0, 5))
    assert (histogram.total, histogram.low, histogram.high) == (0, 0.0, 0.0)
    histogram.merge(Histogram())
    histogram.update(torch.tensor([2.0, 3.0]))
    histogram.update(torch.empty(0))
    assert (histogram.total, histogram.low, histogram.high) == (2, 2.0, 3.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_infinity_are_refused_and_nothing_is_counted(
    bad: float, dtype: torch.dtype
) -> None:
    histogram = histogram_of(torch.tensor([1.0, -2.0]))
    before = state(histogram)
    for batch in ([1e3, bad], [bad], [bad, 0.0, math.inf]):
        with pytest.raises(ValueError, match="NaN or infinity"):
            histogram.update(torch.tensor(batch, dtype=dtype))
        assert state(histogram) == before


def test_memory_does_not_grow() -> None:
    histogram = Histogram()
    for i in range(50):
        histogram.update(torch.tensor([2.0**i, -(2.0 ** (i / 2))]))
    tensors = [v for v in vars(histogram).values() if isinstance(v, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 2 * HALF_BINS * 8
    assert histogram.total == 100


def test_updating_in_inference_mode_and_outside() -> None:
    histogram = Histogram()
    with torch.inference_mode():
        x = torch.tensor([1.0, 2.0])
    histogram.update(x)
    histogram.update(torch.tensor([3.0], requires_grad=True))
    assert not histogram.counts.requires_grad
    assert histogram.total == 3


@given(data=batches(), k=st.integers(1, 500))
@settings(max_examples=60)
def test_ranks_are_exact_to_a_bin_and_the_extremes_exact(data: list[torch.Tensor], k: int) -> None:
    histogram = histogram_of(*data)
    ordered = torch.cat(data).double().sort().values
    k = min(k, ordered.numel())
    largest, smallest = float(ordered[-k]), float(ordered[k - 1])
    slack = 0.0 if k == 1 else histogram.width
    # Outwards of the true value, so that a range starts too wide rather than too narrow.
    assert largest <= histogram.kth_largest(k) <= largest + slack
    assert smallest - slack <= histogram.kth_smallest(k) <= smallest


def places(values: np.ndarray) -> np.ndarray:
    """Where a histogram takes each value to be, by the definition in its docstring."""
    values = values.astype(np.float64).ravel()
    magnitudes = np.sort(np.abs(values))[::-1]
    inner = magnitudes[KEPT - 1] if values.size >= KEPT else 0.0
    exponent = max(math.frexp(inner)[1], SMALLEST_EXPONENT) if inner else SMALLEST_EXPONENT
    limit = math.ldexp(1.0, exponent)
    width = limit / HALF_BINS
    covered = (values >= -limit) & (values < limit)
    return np.where(covered, (np.floor(values / width) + 0.5) * width, values)


@pytest.mark.parametrize("number", [1000, KEPT, 5000, 300_000])
@pytest.mark.parametrize("outlier", [0.0, 1e6, -1e6])
def test_prefix_sums_are_the_moments_of_bin_centres_and_outliers(
    number: int, outlier: float
) -> None:
    x = torch.randn(number, generator=torch.Generator().manual_seed(1)) * 3
    x[7] = outlier
    sums = histogram_of(x).prefix_sums()
    taken = places(x.numpy())
    for threshold in (-2e6, -20.0, -3.3, -1e-3, 0.0, 1e-3, 0.1, 2.0, 20.0, 2e6):
        index = int(sums.index(torch.tensor(threshold, dtype=torch.float64)))
        below = taken[taken < threshold]
        expected = [below.size, below.sum(), np.square(below).sum()]
        # float64 sums in another order, of terms up to the square of the outlier.
        bound = 1e-15 * number * max(1.0, outlier * outlier)
        assert sums.moments[:, index].tolist() == pytest.approx(expected, rel=1e-11, abs=bound)


def tied(number: int, seed: int) -> torch.Tensor:
    """Values with many ties, at the ends too, and rare outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(number, generator=generator) * 8).round().clamp(-20, 14) / 4
    x[torch.randint(number, (number // 2000 + 1,), generator=generator)] = 1e5
    return x


@pytest.mark.parametrize(
    "sizes",
    [
        (1,),
        (KEPT - 1,),
        (KEPT, 1),
        (3, 5000, 700),
        (4 * KEPT * 4 + 3, 999),
        (700_001, 30_000),
        (30_000, 700_001),
        (2_200_013,),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "relu", "tied", "growing", "float16"])
def test_the_kept_largest_and_smallest_values_are_exact(sizes: tuple[int, ...], kind: str) -> None:
    data = []
    for i, number in enumerate(sizes):
        x = torch.randn(number, generator=torch.Generator().manual_seed(i))
        data.append(
            {
                "normal": x,
                "relu": x.relu(),
                "tied": tied(number, i),
                "growing": x * 10.0**i,
                "float16": x.half(),
            }[kind]
        )
    histogram = histogram_of(*data)
    ordered = torch.cat(data).double().sort().values
    ranks = min(KEPT, ordered.numel())
    largest = [histogram.kth_largest(k) for k in range(1, ranks + 1)]
    smallest = [histogram.kth_smallest(k) for k in range(1, ranks + 1)]
    assert largest == ordered.flip(0)[:ranks].tolist()
    assert smallest == ordered[:ranks].tolist()


def test_a_threshold_of_a_finer_dtype_loses_no_value() -> None:
    # Rounded to float32, the least of the kept values is 1.0.
    first = torch.full((KEPT,), 1 - 2.0**-40, dtype=torch.float64)
    histogram = histogram_of(first, torch.ones(3, dtype=torch.float32))
    assert [histogram.kth_largest(k) for k in (3, 4)] == [1.0, 1 - 2.0**-40]


def test_large_batches_in_any_order_and_merged_give_the_same_state() -> None:
    # Bins widen in between, and values that were kept one by one come into them.
    data = [tied(40_000, 1), torch.randn(3000) * 1e4, tied(600, 2), torch.randn(9000).relu() - 2]
    expected = state(histogram_of(torch.cat(data)))
    for order in permutations(data):
        assert state(histogram_of(*order)) == expected
        merged = Histogram()
        for batch in order:
            merged.merge(histogram_of(batch))
        assert state(merged) == expected
    left, right = histogram_of(*data[:2]), histogram_of(*data[2:])
    left.merge(right)
    assert state(left) == expected
    counts, width = brute_force(torch.cat(data).numpy())
    assert left.width == width
    assert np.array_equal(left.counts.numpy(), counts)


def test_ranks_beyond_the_kept_values_are_exact_to_a_bin_of_the_bulk() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(4))
    x[:20] = 1e7
    x[20:30] = -1e6
    histogram = histogram_of(x)
    ordered = x.double().sort().values
    for k in (KEPT + 1, 5000, 25_000, 49_000):
        # The KEPT-th magnitude is below 4: 2^14 bins up to there.
        assert 0 <= histogram.kth_largest(k) - float(ordered[-k]) <= 4 / HALF_BINS
        assert 0 <= float(ordered[k - 1]) - histogram.kth_smallest(k) <= 4 / HALF_BINS


def test_bins_that_widen_in_inference_mode_can_be_updated_outside() -> None:
    histogram = Histogram()
    with torch.inference_mode():
        histogram.update(torch.randn(5000))
        histogram.update(torch.randn(5000) * 1e3)
    histogram.update(torch.randn(5000) * 1e6)
    assert int(histogram.counts.sum()) == 15_000


def test_tails_stay_the_same_size() -> None:
    histogram = Histogram()
    for i in range(5):
        histogram.update(torch.randn(20_000) * 2.0**i)
    for tail in (histogram._largest, histogram._smallest):
        assert tail.values.shape == (KEPT,)
        assert tail.values.untyped_storage().nbytes() == 8 * KEPT
