"""Range search against IFMR evaluated by brute force on the observed values themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amct_pytorch.formats import INT8, IntFormat
from amct_pytorch.observers import range_search
from amct_pytorch.observers.histogram import HALF_BINS, Histogram
from amct_pytorch.observers.range_search import (
    SearchSettings,
    search_range,
    squared_errors,
    starting_points,
)

DISTRIBUTIONS = ("gaussian", "relu", "relu6", "heavy", "negative", "constant", "few", "zeros")


def draw_values(kind: str, number: int, scale: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(number)
    values = {
        "gaussian": x + 0.3,
        "relu": np.maximum(x, 0),
        "relu6": np.clip(4 * x + 3, 0, 6),
        "heavy": rng.standard_t(2, number),
        "negative": -np.abs(x) - 0.1,
        "constant": np.full(number, 0.7),
        "few": rng.integers(-3, 9, number) * 1.0,
        "zeros": np.zeros(number),
    }[kind]
    return (values * scale).astype(np.float32)


@st.composite
def value_sets(draw: st.DrawFn) -> np.ndarray:
    return draw_values(
        draw(st.sampled_from(DISTRIBUTIONS)),
        draw(st.integers(1, 3000)),
        10.0 ** draw(st.integers(-4, 4)),
        draw(st.integers(0, 2**31)),
    )


def histogram_of(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.update(torch.from_numpy(values))
    return histogram


def places(values: np.ndarray, histogram: Histogram) -> np.ndarray:
    """Where the histogram takes each value to be: its bin's centre, or where it is."""
    x = values.astype(np.float64)
    limit = math.ldexp(1.0, histogram._exponent)
    width = limit / HALF_BINS
    centres = (np.floor(x / width) + 0.5) * width
    return np.where((x >= -limit) & (x < limit), centres, x)


def error_of(values: np.ndarray, bits: int, scale: float, offset: int) -> float:
    """Summed squared error of quantize-dequantize, from the definition, in float64."""
    low = -(2 ** (bits - 1))
    x = values.astype(np.float64)
    q = np.clip(np.rint(x / scale) + offset, low, -low - 1)
    return float(np.square((q - offset) * scale - x).sum())


def defined_factors(bits: int, lo: float, hi: float, symmetric: bool) -> tuple[float, int]:
    low, levels = -(2 ** (bits - 1)), 2**bits - 1
    one_sided = hi / (-low - 1) if hi >= -lo else -lo / -low
    scale = one_sided if symmetric else (hi - lo) / levels
    if scale < 2.0**-23:
        return 1.0, 0 if symmetric else low
    offset = 0 if symmetric else int(np.clip(low - np.rint(lo / scale), low, -low - 1))
    return scale, offset


def ifmr(values: np.ndarray, bits: int, settings: SearchSettings, symmetric: bool) -> float:
    """Least error over IFMR's candidates: only hi moves, or both ends where symmetric."""
    ordered = np.sort(values.astype(np.float64))
    n = len(ordered)
    k_high = max(1, n - math.floor(settings.max_percentile * n))
    k_low = max(1, n - math.floor(settings.min_percentile * n))
    hi0, lo0 = max(ordered[-k_high], 0.0), min(ordered[k_low - 1], 0.0)
    start, end = settings.search_range
    found = []
    for i in range(round((end - start) / settings.search_step) + 1):
        r = start + i * settings.search_step
        lo, hi = (r * lo0 if symmetric else lo0), r * hi0
        found.append(error_of(values, bits, *defined_factors(bits, lo, hi, symmetric)))
    return min(found)


@given(values=value_sets(), bits=st.sampled_from([4, 8]), symmetric=st.booleans())
@settings(max_examples=60)
@example(values=draw_values("relu6", 3000, 1.0, 0), bits=8, symmetric=False)
@example(values=draw_values("heavy", 3000, 1.0, 5), bits=8, symmetric=False)
def test_never_worse_than_the_definition(values: np.ndarray, bits: int, symmetric: bool) -> None:
    # With fewer than a million values the default percentiles start at the extremes, k = 1.
    histogram = histogram_of(values)
    scale, offset = search_range(histogram, SearchSettings(), IntFormat(bits), symmetric=symmetric)
    ours = error_of(values, bits, scale, offset)
    defined = ifmr(values, bits, SearchSettings(), symmetric)
    # The search scores bin centres. A value's distance to the nearest level differs from its
    # centre's by half a bin width w at most, so the roots of the summed squares differ by
    # sqrt(n) w / 2 at most, once for our choice and once for the definition's. 1e-5: the
    # candidates' scales are float32 here, float64 in the reference.
    bound = math.sqrt(defined) * (1 + 1e-5) + math.sqrt(len(values)) * histogram.width
    assert math.sqrt(ours) <= bound


@pytest.mark.parametrize("kind", ["gaussian", "relu", "relu6", "heavy", "negative", "few"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_error_stays_within_two_percent_of_the_definition(kind: str, symmetric: bool) -> None:
    # The bound above leaves room for a sloppy search where steps are small; here is what is
    # lost in practice. A step spans 32 bins or more, so that scoring centres misjudges a
    # candidate's error by about (1 / 32)^2 of s^2 / 12: 0.1 %; 2 % leaves room for 20,000 draws.
    values = draw_values(kind, 20000, 1.0, 11)
    scale, offset = search_range(histogram_of(values), SearchSettings(), INT8, symmetric=symmetric)
    ours = error_of(values, 8, scale, offset)
    assert ours <= 1.02 * ifmr(values, 8, SearchSettings(), symmetric) + 1e-12


@pytest.mark.parametrize("percentile", [0.9, 0.99, 0.6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_lower_percentiles_start_at_the_kth_value(percentile: float, symmetric: bool) -> None:
    chosen = SearchSettings(percentile, percentile, (0.8, 1.2), 0.05)
    values = draw_values("heavy", 5000, 1.0, 2)
    histogram = histogram_of(values)
    scale, offset = search_range(histogram, chosen, INT8, symmetric=symmetric)
    # Starting points beyond the kept values are off by a bin: one thousandth of the range.
    assert error_of(values, 8, scale, offset) <= 1.01 * ifmr(values, 8, chosen, symmetric)
    ordered = np.sort(values.astype(np.float64))
    k = 5000 - math.floor(percentile * 5000)
    low, high = starting_points(histogram, chosen)
    assert ordered[-k] <= high <= ordered[-k] + histogram.width
    assert ordered[k - 1] - histogram.width <= low <= ordered[k - 1]


def test_starting_points_include_zero() -> None:
    assert starting_points(histogram_of(np.float32([2, 3])), SearchSettings()) == (0.0, 3.0)
    assert starting_points(histogram_of(np.float32([-2, -3])), SearchSettings()) == (-3.0, 0.0)


def test_max_and_min_percentile_are_not_mixed_up() -> None:
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    low, high = starting_points(histogram_of(values), SearchSettings(0.9, 1.0))
    assert low == -1.0
    assert high == pytest.approx(0.8, abs=1e-6)  # the 101st largest


@given(
    values=value_sets(),
    bits=st.sampled_from([2, 4, 8]),
    lo=st.floats(0, 2),
    hi=st.floats(0, 2),
    symmetric=st.booleans(),
)
@settings(max_examples=80)
def test_scores_are_the_errors_of_the_points(
    values: np.ndarray, bits: int, lo: float, hi: float, symmetric: bool
) -> None:
    histogram = histogram_of(values)
    fmt = IntFormat(bits)
    ends = torch.tensor([[lo * histogram.low, hi * histogram.high], [-hi, lo]]).float()
    scale, offset = fmt.factors(ends[:, 0], ends[:, 1], symmetric=symmetric)
    got = squared_errors(histogram.prefix_sums(), fmt, scale, offset).tolist()
    centres = places(values, histogram)
    power = float(np.square(centres).sum())
    for i, score in enumerate(got):
        expected = error_of(centres, bits, scale[i].item(), offset[i].item())
        # The score is a difference of cumulated moments: float64 rounding of the largest of
        # them, which the squared levels can exceed the data's power by.
        level = (2**bits * scale[i].item()) ** 2 * len(values)
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-11 * (power + level))


@pytest.mark.parametrize("outlier", [1e2, 1e4, 1e6, -3e4])
@pytest.mark.parametrize("kind", ["gaussian", "relu"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_rare_outlier_leaves_the_range_to_the_definition(
    outlier: float, kind: str, symmetric: bool
) -> None:
    # Two of two million values may lie beyond the starting point, so the outlier is one that
    # the definition gives up; here two of twenty thousand.
    chosen = SearchSettings(0.9999, 0.9999)
    values = draw_values(kind, 20_000, 1.0, 4)
    values[7] = outlier
    histogram = histogram_of(values)
    ordered = np.sort(values.astype(np.float64))
    k = 20_000 - math.floor(0.9999 * 20_000)
    assert k > 1
    assert starting_points(histogram, chosen) == (min(ordered[k - 1], 0.0), ordered[-k])
    scale, offset = search_range(histogram, chosen, INT8, symmetric=symmetric)
    ours = error_of(values, 8, scale, offset)
    # float32 scales here and float64 ones in the reference.
    assert ours <= ifmr(values, 8, chosen, symmetric) * (1 + 1e-6)
    score = squared_errors(
        histogram.prefix_sums(), INT8, torch.tensor([scale]), torch.tensor([offset])
    )
    # Clipping the outlier hides the error of the others, so they are looked at alone too.
    assert float(score) == pytest.approx(ours, rel=1e-6)
    bulk = np.delete(values, 7)
    left = float(score) - error_of(values[7:8], 8, scale, offset)
    rounding = 1e-15 * len(values) * outlier**2
    assert left == pytest.approx(error_of(bulk, 8, scale, offset), rel=0.02, abs=rounding)


def test_scores_on_raw_data_are_within_half_a_bin() -> None:
    for kind in ("gaussian", "relu6", "heavy", "negative"):
        values = draw_values(kind, 4000, 2.5, 7)
        histogram = histogram_of(values)
        for share in (0.3, 0.8, 1.2):
            ends = torch.tensor([histogram.low, histogram.high]) * share
            scale, offset = INT8.factors(ends[:1], ends[1:], symmetric=False)
            scored = float(squared_errors(histogram.prefix_sums(), INT8, scale, offset)[0])
            real = error_of(values, 8, scale.item(), offset.item())
            # See test_never_worse_than_the_definition.
            slack = math.sqrt(len(values)) * histogram.width / 2
            assert abs(math.sqrt(scored) - math.sqrt(real)) <= slack


def test_the_lower_end_moves_too() -> None:
    # One far negative outlier, coarse steps: giving it up is far better, and is out of reach
    # for a search that moves only the upper end. With A = n / (2 * 12 * 15^2) the error is
    # A (hi - lo)^2 + (4 + lo)^2, so about a third remains where lo goes to 0.
    values = np.concatenate([draw_values("relu", 20_000, 1.0, 0), np.float32([-4.0])])
    wide = SearchSettings(search_range=(0.1, 1.3))
    scale, offset = search_range(histogram_of(values), wide, IntFormat(4), symmetric=False)
    ours = error_of(values, 4, scale, offset)
    assert ours < 0.6 * ifmr(values, 4, wide, symmetric=False)


def test_one_sided_negative_data_gets_the_whole_range() -> None:
    values = draw_values("negative", 5000, 1.0, 3)
    scale, offset = search_range(histogram_of(values), SearchSettings(), INT8, symmetric=False)
    assert offset == 127  # zero is the largest level
    assert scale < 1.0 / 255 * -values.min() * 1.3


def test_nothing_but_zeros_gives_the_scale_of_an_empty_range() -> None:
    histogram = histogram_of(np.zeros(10, np.float32))
    assert search_range(histogram, SearchSettings(), INT8, symmetric=False) == (1.0, -128)
    assert search_range(histogram, SearchSettings(), INT8, symmetric=True) == (1.0, 0)


@given(
    start=st.floats(0.05, 1.5),
    width=st.floats(0.01, 2),
    steps=st.integers(1, 300),
)
def test_multiples_span_the_search_range(start: float, width: float, steps: int) -> None:
    step = width / steps
    search = SearchSettings(search_range=(start, start + width), search_step=step)
    assert search.count() == steps + 1
    first, last = search.multiple(torch.tensor([0.0, steps], dtype=torch.float64)).tolist()
    assert first == start
    assert last == pytest.approx(start + width, rel=1e-9)


def mean_squared_error(histogram: Histogram, scale: float, offset: int) -> float:
    found = squared_errors(
        histogram.prefix_sums(), INT8, torch.tensor([scale]), torch.tensor([offset])
    )
    return float(found)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "relu", "heavy", "few"])
def test_a_fine_step_is_searched_from_coarse_to_fine(kind: str, symmetric: bool) -> None:
    """Against every multiple of the same step, scored one by one over a few thousand of them."""
    histogram = histogram_of(draw_values(kind, 5000, 1.0, 3))
    low, high = starting_points(histogram, SearchSettings())
    multiples = 0.7 + 0.6 / 5000 * torch.arange(5001, dtype=torch.float64)
    lows = multiples * low if symmetric else torch.full_like(multiples, low)
    factors = INT8.factors(lows.float(), (multiples * high).float(), symmetric=symmetric)
    every = squared_errors(histogram.prefix_sums(), INT8, *factors)
    settings = SearchSettings(search_step=0.6 / 5000)
    found = mean_squared_error(
        histogram, *search_range(histogram, settings, INT8, symmetric=symmetric)
    )
    # It need not be the very best of all, but is never worse than every fifth of them alone.
    assert found <= float(every[::5].min()) * (1 + 1e-12)


@pytest.mark.parametrize("step", [1e-6, 1e-12, 5e-324])
def test_any_step_takes_a_bounded_number_of_candidates(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []

    def counting(sums, number_format, scale, offset):  # type: ignore[no-untyped-def]
        scored.append(len(scale))
        return squared_errors(sums, number_format, scale, offset)

    monkeypatch.setattr(range_search, "squared_errors", counting)
    histogram = histogram_of(draw_values("gaussian", 5000, 1.0, 3))
    coarse = search_range(histogram, SearchSettings(), INT8, symmetric=False)
    scored.clear()
    fine = search_range(histogram, SearchSettings(search_step=step), INT8, symmetric=False)
    assert sum(scored) < 20_000
    assert mean_squared_error(histogram, *fine) <= mean_squared_error(histogram, *coarse)


def test_scale_is_a_float32_value() -> None:
    values = draw_values("gaussian", 999, 1.0, 1)
    scale, _ = search_range(histogram_of(values), SearchSettings(), INT8, symmetric=False)
    assert float(np.float32(scale)) == scale
