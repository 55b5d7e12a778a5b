"""Mean inputs, output samples and the comparison of two tensors."""

import math

import pytest
import torch

from amct_pytorch.observers.mean_input import MeanInput
from amct_pytorch.observers.statistics import SAMPLE_SIZE, Agreement, sample, sampled_channels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_of(*batches: torch.Tensor, channels_last: bool) -> list[tuple[torch.Tensor, int]]:
    mean = MeanInput()
    for batch in batches:
        mean.update(batch, channels_last=channels_last)
    return mean.means()


# float32 sums of some dozens of values near 1, against float64.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def test_mean_of_images_keeps_positions() -> None:
    batches = [random(n, 3, 4, 5, seed=n) for n in (1, 7, 2)]
    ((mean, items),) = mean_of(*batches, channels_last=False)
    assert items == 10
    torch.testing.assert_close(
        mean.double(), torch.cat(batches).double().mean(0)[None], **TOLERANCE
    )


def test_sizes_are_kept_apart() -> None:
    small, large = random(4, 3, 2, 2), random(6, 3, 5, 2)
    found = {tuple(m.shape): (m, n) for m, n in mean_of(small, large, small, channels_last=False)}
    assert set(found) == {(1, 3, 2, 2), (1, 3, 5, 2)}
    mean, items = found[1, 3, 2, 2]
    assert items == 8
    torch.testing.assert_close(mean, small.mean(0, keepdim=True), **TOLERANCE)
    assert found[1, 3, 5, 2][1] == 6


def test_every_leading_axis_of_a_linear_input_counts_items() -> None:
    batches = [random(5, 8), random(2, 3, 8, seed=1), random(1, 2, 2, 8, seed=2)]
    ((mean, items),) = mean_of(*batches, channels_last=True)
    assert items == 5 + 6 + 4
    rows = torch.cat([b.reshape(-1, 8) for b in batches]).double()
    torch.testing.assert_close(mean.double(), rows.mean(0)[None], **TOLERANCE)


def test_half_precision_input_is_summed_in_float32() -> None:
    x = torch.full((4000, 2), 3.0, dtype=torch.float16)
    ((mean, _),) = mean_of(x, x, x, channels_last=True)
    # A float16 sum would end at infinity, beyond 65504.
    assert mean.tolist() == [[3.0, 3.0]]


def test_the_batch_is_not_kept_or_changed() -> None:
    x = random(1, 3, 2, 2)
    before = x.clone()
    mean = MeanInput()
    mean.update(x, channels_last=False)
    mean.update(x, channels_last=False)
    assert torch.equal(x, before)
    ((found, _),) = mean.means()
    torch.testing.assert_close(found, before)


def test_empty_batches_do_not_count() -> None:
    x = random(2, 3, 4, 4)
    found = mean_of(x, torch.empty(0, 3, 9, 9), torch.empty(0, 3, 4, 4), channels_last=False)
    ((mean, items),) = found
    assert items == 2
    assert bool(mean.isfinite().all())


def test_sqnr_and_cosine_follow_their_formulas() -> None:
    a = random(1000)
    b = a + 0.1 * random(1000, seed=1)
    found = Agreement.between(a, b)
    a, b = a.double(), b.double()
    expected = 10 * math.log10(float((a**2).sum() / ((a - b) ** 2).sum()))
    assert found.sqnr_db == pytest.approx(expected, rel=1e-12)
    assert found.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-12)
    opposite = Agreement.between(a, -a)
    # The error is twice the signal: 10 log10(1 / 4).
    assert (opposite.sqnr_db, opposite.cosine) == (
        pytest.approx(-6.0206, abs=1e-4),
        pytest.approx(-1, rel=1e-12),
    )


def test_agreement_at_its_edges() -> None:
    zero, x = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    assert Agreement.between(x, x.clone()) == Agreement(math.inf, 1.0)
    assert Agreement.between(zero, zero) == Agreement(math.inf, 1.0)
    assert Agreement.between(torch.empty(0), torch.empty(0)) == Agreement(math.inf, 1.0)
    assert Agreement.between(zero, x) == Agreement(-math.inf, 0.0)
    assert Agreement.between(x, zero) == Agreement(0.0, 0.0)


def test_agreement_of_half_precision_does_not_overflow() -> None:
    x = torch.full((100,), 60000.0, dtype=torch.float16)
    found = Agreement.between(x, x * 0.5)
    assert found.sqnr_db == pytest.approx(6.0206, abs=1e-3)  # error: half the signal


def test_masked_outputs_are_compared_where_they_are_finite() -> None:
    # Masked logits hold -inf in both networks; that is no disagreement.
    a = torch.tensor([1.0, -math.inf, 2.0, math.nan])
    b = torch.tensor([1.0, -math.inf, 2.5, math.nan])
    found = Agreement.between(a, b)
    assert found == Agreement.between(a[[0, 2]], b[[0, 2]])
    assert Agreement.between(a, a.clone()) == Agreement(math.inf, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_lost_value_is_no_agreement_at_all(bad: float) -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, bad])
    assert Agreement.between(a, b) == Agreement(-math.inf, 0.0)
    assert Agreement.between(b, a) == Agreement(-math.inf, 0.0)
    if math.isinf(bad):
        assert Agreement.between(b, -b) == Agreement(-math.inf, 0.0)


@pytest.mark.parametrize("number", [1, SAMPLE_SIZE, SAMPLE_SIZE + 1, 3 * SAMPLE_SIZE, 10**6])
def test_sample_is_small_deterministic_and_spread(number: int) -> None:
    y = torch.arange(number, dtype=torch.float64)
    first = sample(y)
    assert torch.equal(first, sample(y.clone()))
    assert first.dtype == torch.float32
    assert 1 <= first.numel() <= SAMPLE_SIZE
    assert set(first.diff().tolist()) <= {first[1:2].sum().item()}, "not at even distances"
    # The first and the last stretch are both represented: the step is below n / size + 2.
    assert first[0] == 0
    assert number - 1 - float(first[-1]) < number / SAMPLE_SIZE + 2


def test_sample_does_not_keep_step_with_even_image_sizes() -> None:
    y = torch.zeros(16, 8, 64, 64)
    y[..., 1::2] = 1.0
    # A step of 8 would see only even columns.
    assert float(sample(y).mean()) == pytest.approx(0.5, abs=0.01)


def test_sample_is_a_copy() -> None:
    y = torch.ones(10)
    taken = sample(y)
    y.zero_()
    assert float(taken.sum()) == 10


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 96, 56, 56), 1), ((3, 5, 7, 7), 1), ((4, 6, 16), -1), ((2, 10), 1)]
)
def test_sampled_channels_are_those_of_the_sample(shape: tuple[int, ...], axis: int) -> None:
    size = [1] * len(shape)
    size[axis] = -1
    numbered = torch.arange(float(shape[axis])).view(size).expand(shape)
    channels = sampled_channels(numbered, axis)
    assert torch.equal(channels.float(), sample(numbered))
    # No channel is left out where there is room for all.
    assert set(channels.tolist()) == set(range(shape[axis]))
