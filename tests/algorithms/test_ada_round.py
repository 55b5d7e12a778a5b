"""ADA on single units: never worse than nearest rounding, and what makes it better."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from amct_pytorch.algorithms.ada_learning import AdaSettings, learn_rounding
from amct_pytorch.algorithms.ada_round import ada_round
from amct_pytorch.algorithms.unit import Unit, best_bias
from amct_pytorch.algorithms.unit_range import best_range, quantized
from amct_pytorch.algorithms.unit_rounding import round_with_feedback
from amct_pytorch.formats import IntFormat

INT4, INT8 = IntFormat(4), IntFormat(8)
SHORT = AdaSettings(iterations=200)


def unit(
    groups: int = 1,
    size: int = 24,
    channels: int = 10,
    rows: int = 600,
    activation: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Unit:
    """Correlated inputs, whose noise stands for the quantized layers before."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, size, size, generator=g)
    x = torch.randn(groups, rows, size, generator=g) @ mixing
    weight = torch.randn(groups, size, channels, generator=g) * 0.2
    bias = torch.randn(groups * channels, generator=g)
    targets = (x @ weight).transpose(0, 1).flatten(1) + bias
    noisy = x + 0.02 * torch.randn(x.shape, generator=g) * x.std()
    return Unit(noisy, targets, weight, bias, activation)


def spanning(one: Unit, fmt: IntFormat) -> Tensor:
    return one.weight.abs().amax(1).flatten() / fmt.qmax


def relative(one: Unit, scale: Tensor, steps: Tensor, bias: Tensor) -> float:
    y = one.outputs(steps * one.per_channel(scale)) + bias
    return one.loss(one.errors(y))


SHAPES = {
    "dense": {"groups": 1, "size": 24, "channels": 10},
    "depthwise": {"groups": 12, "size": 9, "channels": 1},
    "grouped": {"groups": 3, "size": 8, "channels": 5},
    "large groups": {"groups": 2, "size": 70, "channels": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, F.relu, F.relu6, F.gelu, torch.tanh])
@pytest.mark.parametrize("fmt", [INT4, INT8], ids=["int4", "int8"])
def test_error_is_what_is_told_and_well_below_nearest_rounding(
    shape: str, activation: Callable[[Tensor], Tensor] | None, fmt: IntFormat
) -> None:
    one = unit(**SHAPES[shape], activation=activation)
    scale = spanning(one, fmt)
    found = ada_round(one, scale, torch.zeros_like(scale), fmt, SHORT)
    assert torch.equal(found.steps, fmt.round(found.steps))
    assert bool((found.scale > 0).all())
    assert relative(one, found.scale, found.steps, found.bias) == pytest.approx(found.error)
    nearest = fmt.round(one.weight / one.per_channel(scale))
    assert found.error_nearest == pytest.approx(relative(one, scale, nearest, one.bias))
    # With 8 bits the noise of the inputs is what remains.
    assert found.error < (0.6 if fmt is INT4 else 1.0) * found.error_nearest


def test_one_scale_for_all_channels_stays_one() -> None:
    one = unit(activation=F.relu)
    scale = spanning(one, INT4).amax().reshape(1)
    found = ada_round(one, scale, torch.zeros(1), INT4, SHORT)
    assert found.scale.shape == (1,)
    assert found.error < 0.6 * found.error_nearest


def test_no_scale_falls_below_the_least() -> None:
    one = unit()
    scale = spanning(one, INT4)
    least = scale * torch.linspace(0.5, 1.0, len(scale))
    found = ada_round(one, scale, least, INT4, SHORT)
    assert bool((found.scale >= least).all())


def test_for_a_layer_without_activation_feedback_is_no_worse_than_learning() -> None:
    one = unit(rows=2000)
    scale = spanning(one, INT4)
    nearest = INT4.round(one.weight / one.per_channel(scale))
    bias, errors = best_bias(one, nearest * one.per_channel(scale))
    settings = AdaSettings(iterations=2000)
    learned = learn_rounding(one, scale, nearest, bias, errors, INT4, settings)
    bias, errors = best_bias(one, learned.steps * one.per_channel(scale), learned.bias)
    found = ada_round(one, scale, torch.zeros_like(scale), INT4, settings)
    assert found.iterations == 0
    assert found.error < one.loss(errors)


def test_learning_lowers_the_error_behind_an_activation() -> None:
    one = unit(groups=1, size=16, channels=30, rows=3000, activation=F.relu)
    scale = spanning(one, INT4)
    nearest = INT4.round(one.weight / one.per_channel(scale))
    bias, errors = best_bias(one, nearest * one.per_channel(scale))
    learned = learn_rounding(one, scale, nearest, bias, errors, INT4, AdaSettings(iterations=1000))
    _, after = best_bias(one, learned.steps * one.per_channel(scale), learned.bias)
    assert one.loss(after) < 0.65 * one.loss(errors)
    # From what feedback finds it goes on, and never back.
    without = ada_round(one, scale, torch.zeros_like(scale), INT4, AdaSettings(iterations=0))
    found = ada_round(one, scale, torch.zeros_like(scale), INT4, AdaSettings(iterations=1000))
    assert without.iterations == 0 < found.iterations
    assert found.error <= without.error


def test_learning_stops_when_the_rounding_has_settled() -> None:
    one = unit(size=4, channels=2, activation=F.relu)
    scale = spanning(one, INT8)
    steps = INT8.round(one.weight / one.per_channel(scale))
    bias, errors = best_bias(one, steps * one.per_channel(scale))
    settings = AdaSettings(iterations=20000, regularisation=0.5, warm_start=0.01)
    assert learn_rounding(one, scale, steps, bias, errors, INT8, settings).iterations < 20000


def test_rounding_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = unit(activation=F.relu)
    scale = spanning(one, INT4)
    a, b = (ada_round(one, scale, torch.zeros_like(scale), INT4, SHORT) for _ in range(2))
    assert torch.equal(a.steps, b.steps)
    assert torch.equal(a.bias, b.bias)
    assert torch.equal(torch.get_rng_state(), state)


def test_coordinate_descent_ends_where_no_single_step_helps() -> None:
    one = unit(groups=6, size=9, channels=1, rows=400)
    scale, steps = round_with_feedback(one, INT4, (1.0,), one_scale=False)
    x = one.inputs - one.inputs.mean(1, keepdim=True)

    def loss(candidate: Tensor) -> Tensor:
        error = candidate * one.per_channel(scale) - one.weight
        y = (x @ error).square().mean((1, 2))
        return y + one.ridge(candidate * one.per_channel(scale))

    least = loss(steps)
    for k in range(9):
        for step in (-1, 1):
            moved = steps.clone()
            moved[:, k] = (moved[:, k] + step).clamp(INT4.qmin, INT4.qmax)
            assert bool((loss(moved) >= least * (1 - 1e-4)).all())


def test_dead_channels_and_constant_inputs_give_finite_results() -> None:
    one = unit(groups=1, size=6, channels=4, activation=F.relu)
    weight, inputs = one.weight.clone(), one.inputs.clone()
    weight[:, :, 1] = 0
    inputs[:, :, 2] = 0
    inputs[:, :, 3] = 1
    targets = (inputs @ weight)[0] + one.bias
    targets[:, 2] = -5.0
    dead = Unit(inputs, targets, weight, one.bias, F.relu)
    scale = spanning(dead, INT4).clamp(min=2.0**-23)
    found = ada_round(dead, scale, torch.zeros_like(scale), INT4, SHORT)
    assert bool(found.steps.isfinite().all() and found.bias.isfinite().all())
    assert found.error <= found.error_nearest


def test_range_is_chosen_by_the_output() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2000, 8, generator=g)
    # The channel with the large values has next to no weight.
    x[:, :, 0] *= 30
    weight = torch.randn(1, 8, 4, generator=g)
    weight[:, 0] *= 1e-4
    one = Unit(x, (x @ weight)[0], weight, torch.zeros(4))
    scale, offset = INT8.factors(x.min(), x.max(), symmetric=False)
    better = best_range(one, float(scale), int(offset), INT8, symmetric=False)

    def error(scale: float, offset: int) -> float:
        y = (quantized(x, scale, offset, INT8) @ weight)[0]
        return float((y - one.targets).square().mean())

    assert error(*better) < 0.3 * error(float(scale), int(offset))
    symmetric = best_range(one, float(scale), 0, INT8, symmetric=True)
    assert symmetric[1] == 0


def test_a_channel_that_hardly_varies_does_not_clip_the_others() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.cat(
        (torch.randn(1, 2000, 1, generator=g) * 10, torch.randn(1, 2000, 7, generator=g)), 2
    )
    weight = torch.zeros(1, 8, 8)
    weight[0, 0, 0] = 1.0
    # Nearly nothing comes out of seven channels, all of it from small values.
    weight[0, 1:, 1:] = 1e-3 * torch.randn(7, 7, generator=g)
    one = Unit(x, (x @ weight)[0], weight, torch.zeros(8))
    scale, offset = INT8.factors(x.min(), x.max(), symmetric=False)
    found = best_range(one, float(scale), int(offset), INT8, symmetric=False)
    assert found[0] > 0.8 * float(scale)


def test_range_at_zero_stays_there() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.rand(1, 500, 8, generator=g) * 6
    weight = torch.randn(1, 8, 4, generator=g)
    one = Unit(x, (x @ weight)[0], weight, torch.zeros(4))
    scale, offset = best_range(one, 6 / 255, -128, INT8, symmetric=False)
    assert offset == -128
    assert scale == pytest.approx(6 / 255, rel=0.1)
