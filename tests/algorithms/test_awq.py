import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amct_pytorch.algorithms.awq import AwqSettings, awq_scale, solve_awq
from amct_pytorch.algorithms.clip_search import clip_search
from amct_pytorch.algorithms.weight_grid import SHRINKS, WeightGrid
from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import FORMATS, Granularity, fake_quantize, params_of, scale_from_range

GRIDS = {
    "int4 tensor": WeightGrid(FORMATS["int4"], Granularity("tensor")),
    "int4 channel": WeightGrid(FORMATS["int4"], Granularity("channel")),
    "int4 group": WeightGrid(FORMATS["int4"], Granularity("group", 32), symmetric=False),
    "int4 short group": WeightGrid(FORMATS["int4"], Granularity("group", 40)),
    "int8 channel": WeightGrid(FORMATS["int8"], Granularity("channel"), symmetric=False),
    "float4": WeightGrid(FORMATS["float4_e2m1"], Granularity("group", 32)),
    "mxfp4": WeightGrid(FORMATS["mxfp4_e2m1"], Granularity("group", 32)),
}


def layer(seed=0, outputs=(12, 20), inputs=96, tokens=200):
    """Weights that share an input, and the input: correlated channels of different size."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randn(inputs, generator=g).mul(1.5).exp()
    x = (torch.randn(tokens, inputs, generator=g) + torch.randn(tokens, 1, generator=g)) * sizes
    return [torch.randn(n, inputs, generator=g) for n in outputs], x


def statistics(x):
    return x.T @ x / len(x), x.abs().mean(0)


def nearest(weight, grid):
    params = params_of(weight, grid.fmt, grid.granularity, symmetric=grid.symmetric)
    return rounded(weight, params, grid)


def rounded(weight, params, grid):
    return fake_quantize(weight, params.scale, params.offset, grid.fmt, grid.granularity)


def output_error(x, weight, other):
    """By running the layer, in float64."""
    return float((x.double() @ (weight - other).double().T).square().sum(1).mean())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_chooses_the_exponent_that_a_search_on_the_data_chooses(grid):
    weights, x = layer()
    result = solve_awq(weights, *statistics(x), grid, AwqSettings(10, clip=False))
    errors = {}
    for step in range(10):
        scale = awq_scale(x.abs().mean(0), step / 10)
        own = [output_error(x, w, nearest(w * scale, grid) / scale) for w in weights]
        plain = [output_error(x, w, nearest(w, grid)) for w in weights]
        # What layers share must make none of them worse.
        if not step or all(a <= b for a, b in zip(own, plain, strict=True)):
            errors[step / 10] = sum(own)
    assert result.alpha == min(errors, key=errors.get)
    # The same error by second moments in float32 and token by token in float64.
    assert sum(found.loss for found in result.layers) == pytest.approx(
        min(errors.values()), rel=1e-3
    )
    assert sum(found.loss_nearest for found in result.layers) == pytest.approx(errors[0], rel=1e-3)
    assert result.alpha > 0


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(GRIDS)))
@settings(max_examples=40, deadline=None)
def test_is_never_worse_than_the_definition(seed, name):
    grid = GRIDS[name]
    weights, x = layer(seed, outputs=(6, 3), tokens=60)
    plain = solve_awq(weights, *statistics(x), grid, AwqSettings(5, clip=False))
    clipped = solve_awq(weights, *statistics(x), grid, AwqSettings(5))
    total = {
        found: sum(one.loss for one in found.layers) for found in (plain, clipped)
    }  # fmt: skip
    # Rounding of float32 products, nothing else, may tell equal errors apart.
    slack = 1 + 1e-4
    assert total[clipped] <= total[plain] * slack
    assert total[plain] <= sum(one.loss_nearest for one in plain.layers) * slack
    for weight, found in zip(weights, clipped.layers, strict=True):
        again = rounded(weight * clipped.input_scale, found.params, grid)
        assert torch.equal(again, found.weight)
        assert output_error(x, weight, found.weight / clipped.input_scale) == pytest.approx(
            found.loss, rel=1e-2
        )


def test_scale_follows_the_mean_magnitude():
    mean_abs = torch.tensor([4.0, 1.0, 0.0, 16.0])
    # sqrt is 2, 1, 4; the geometric mean of its extremes is 2; no input: 1.
    assert awq_scale(mean_abs, 0.5).tolist() == pytest.approx([1.0, 0.5, 1.0, 2.0])
    assert awq_scale(mean_abs, 0).tolist() == [1, 1, 1, 1]
    assert awq_scale(torch.zeros(2), 0.5).tolist() == [1, 1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_of_whole_rows_is_the_best_of_all_candidates(symmetric):
    grid = WeightGrid(FORMATS["int4"], Granularity("channel"), symmetric)
    (weight,), x = layer(outputs=(8,))
    weight[:, 3] *= 6  # an outlier in each row, so that some ranges are worth narrowing
    params = params_of(weight, grid.fmt, grid.granularity, symmetric=symmetric)
    found = rounded(weight, clip_search(weight, params, statistics(x)[0], grid), grid)
    narrowed = 0
    for row, chosen in zip(weight, found, strict=True):
        errors = []
        for shrink in SHRINKS:
            low, high = row.amin().view(1, 1) * shrink, row.amax().view(1, 1) * shrink
            tried = scale_from_range(low, high, grid.fmt, symmetric=symmetric)
            errors.append(output_error(x, row[None], rounded(row[None], tried, grid)))
        assert output_error(x, row[None], chosen[None]) == pytest.approx(min(errors), rel=1e-3)
        narrowed += min(errors) < errors[0]
    assert narrowed


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(GRIDS)))
@settings(max_examples=40, deadline=None)
def test_clip_search_never_raises_the_error(seed, name):
    grid = GRIDS[name]
    (weight,), x = layer(seed, outputs=(5,), tokens=50)
    params = params_of(weight, grid.fmt, grid.granularity, symmetric=grid.symmetric)
    found = clip_search(weight, params, statistics(x)[0], grid)
    assert found.scale.shape == params.scale.shape
    before, after = (output_error(x, weight, rounded(weight, p, grid)) for p in (params, found))
    assert after <= before * (1 + 1e-4)  # float32 products


def test_sees_how_errors_of_groups_add_up():
    """Two groups with the same input: the second one's error can cancel the first one's."""
    grid = WeightGrid(FORMATS["int4"], Granularity("group", 32))
    g = torch.Generator().manual_seed(1)
    half = torch.randn(100, 32, generator=g)
    x, weight = torch.cat([half, half], 1), torch.randn(16, 64, generator=g)
    moments = statistics(x)[0]
    alone = moments.clone()
    alone[:32, 32:] = alone[32:, :32] = 0
    params = params_of(weight, grid.fmt, grid.granularity)
    together, apart = (
        output_error(x, weight, rounded(weight, clip_search(weight, params, m, grid), grid))
        for m in (moments, alone)
    )
    assert together < 0.95 * apart  # 0.87 here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights is empty"),
        ({"weights": [torch.ones(3, 5)]}, r"weights\[0\] has shape \(3, 5\); allowed is \[N, 4\]"),
        ({"weights": [torch.full((3, 4), torch.nan)]}, r"weights\[0\] holds NaN"),
        ({"second_moments": torch.eye(3)}, r"second_moments has shape \(3, 3\)"),
        ({"mean_abs": torch.full((4,), torch.inf)}, "mean_abs holds NaN or infinity"),
    ],
)
def test_bad_input(change, message):
    arguments = {"weights": [torch.ones(3, 4)], "second_moments": torch.eye(4)}
    arguments |= {"mean_abs": torch.ones(4), "grid": GRIDS["int4 channel"]}
    with pytest.raises(ArgumentValueError, match=message):
        solve_awq(**{**arguments, **change})


def test_bad_settings():
    with pytest.raises(ArgumentValueError, match="grids_num is 0; allowed are 1 and above"):
        AwqSettings(0)
