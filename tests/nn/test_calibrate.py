"""The stages of calibration on single layers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from amct_pytorch.errors import CalibrationError
from amct_pytorch.formats import INT8
from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.nn.calibrate import Check, Observe, corrected_bias
from amct_pytorch.nn.simulate import IntegerOperands, integer_bias
from amct_pytorch.nn.wrapped import CompressedLayer
from amct_pytorch.record.factors import LayerFactors


def observed(
    inner: nn.Module, *batches: torch.Tensor, outputs: bool = False
) -> tuple[CompressedLayer, Observe]:
    """A layer that has run on each batch under `Observe`."""
    kind = LAYER_KINDS[type(inner).__name__]
    layer = CompressedLayer("x", kind, inner, inner.weight, inner.bias)
    stage = Observe(["x"], frozenset(["x"] if outputs else []), with_means=True)
    layer.stage = stage
    for i, batch in enumerate(batches):
        stage.batch, stage.last = i, i == len(batches) - 1
        assert torch.equal(layer(batch), inner(batch)), "observing changed the result"
    return layer, stage


def coarse(layer: CompressedLayer, scale_d: float) -> IntegerOperands:
    """Operands with 3-bit weights, whose rounding error is large."""
    scale_w = layer.weight.abs().max().item() / 3
    factors = LayerFactors((scale_w,), scale_d, -128, weight_bits=3)
    return IntegerOperands.of(layer, factors)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_statistics_are_those_of_all_batches_and_the_sample_of_the_last() -> None:
    inner = nn.Conv2d(2, 3, 3)
    batches = [random(4, 2, 6, 6, seed=i) * (i + 1) for i in range(3)]
    _, stage = observed(inner, *batches, outputs=True)
    statistics = stage.statistics["x"]
    assert statistics.inputs.total == sum(b.numel() for b in batches)
    assert statistics.inputs.high == max(b.max().item() for b in batches)
    assert statistics.outputs is not None
    assert statistics.outputs.low == min(inner(b).min().item() for b in batches)
    assert statistics.output is not None
    assert torch.equal(statistics.output, inner(batches[-1]).detach().flatten())
    assert stage.calls["x"].x.numel() == 0, "a whole batch is kept"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_data_names_layer_and_batch(bad: float) -> None:
    x = random(1, 2, 6, 6)
    wrong = x.clone()
    wrong[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"the input of layer 'x' .* calibration batch 2;"):
        observed(nn.Conv2d(2, 3, 3), x, wrong)


def test_an_output_that_overflows_names_layer_and_batch() -> None:
    inner = nn.Linear(2, 1)
    nn.init.constant_(inner.weight, 1e38)
    with pytest.raises(CalibrationError, match=r"the output of layer 'x' .* calibration batch 1;"):
        observed(inner, torch.full((1, 2), 100.0), outputs=True)


@pytest.mark.parametrize(
    ("inner", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (8, 4, 7, 7)),
        (nn.Linear(12, 5), (8, 3, 12)),
    ],
    ids=["conv", "linear"],
)
def test_corrected_bias_takes_the_mean_weight_error_out(
    inner: nn.Module, shape: tuple[int, ...]
) -> None:
    batches = [random(*shape, seed=i) for i in range(3)]
    layer, stage = observed(inner, *batches)
    operands = coarse(layer, 1 / 255)
    mean = stage.statistics["x"].mean_input
    assert mean is not None
    bias = corrected_bias(layer, operands, stage.calls["x"], mean, 2**23)
    weight = operands.weight * (operands.dequant_scale * 255)
    every = torch.cat(batches)
    axis = layer.kind.channel_axis
    call = stage.calls["x"]
    error = call.run(every, weight, bias.float()) - inner(every)
    means = error.transpose(0, axis).flatten(1).mean(1)
    # float32 sums of 18 products below 1; the error was around 0.1 before.
    assert float(means.abs().max()) < 1e-5
    before = call.run(every, weight, layer.bias) - inner(every)
    assert float(before.transpose(0, axis).flatten(1).mean(1).abs().max()) > 1e-3


def test_corrected_bias_stays_below_the_limit() -> None:
    layer, stage = observed(nn.Linear(4, 3), random(5, 4))
    operands = coarse(layer, 1 / 255)
    mean = stage.statistics["x"].mean_input
    assert mean is not None
    bias = corrected_bias(layer, operands, stage.calls["x"], mean, 2)
    assert float(integer_bias(bias, operands.dequant_scale).abs().max()) <= 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_correction_that_hurts_is_taken_back(sign: float) -> None:
    x = random(50, 6)
    layer, stage = observed(nn.Linear(6, 4), x)
    operands = coarse(layer, 1 / 255)
    mean = stage.statistics["x"].mean_input
    assert mean is not None
    change = corrected_bias(layer, operands, stage.calls["x"], mean, 2**23) - layer.bias.double()
    change = change * sign
    corrected = integer_bias(layer.bias.double() + change, operands.dequant_scale)
    table = {"x": replace(operands, bias=corrected)}
    check = Check(table, stage.statistics, {"x": change})
    layer.stage = check
    y = layer(x)
    errors = check.errors["x"]
    assert errors.corrected is (sign > 0)
    if sign > 0:
        assert errors.final.sqnr_db > errors.uncorrected.sqnr_db
        assert torch.equal(table["x"].bias, corrected)
    else:
        assert errors.final == errors.uncorrected
        assert torch.equal(table["x"].bias, operands.bias)
        # Taken back after the fact: the same numbers up to float32 and one bias step.
        expected = operands.run(layer, replace(stage.calls["x"], x=x))
        step = float(operands.dequant_scale.max())
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=step)


def test_a_layer_without_correction_reports_one_error() -> None:
    x = random(50, 6)
    layer, stage = observed(nn.Linear(6, 4), x)
    scale, offset = INT8.factors(torch.tensor(0.0), x.max(), symmetric=False)
    factors = LayerFactors((layer.weight.abs().max().item() / 127,), scale.item(), offset.item())
    check = Check({"x": IntegerOperands.of(layer, factors)}, stage.statistics, {})
    layer.stage = check
    layer(x)
    errors = check.errors["x"]
    assert errors.final == errors.uncorrected
    assert not errors.corrected
    # int8 on both sides of a small layer: about 6 dB a bit.
    assert errors.final.sqnr_db > 30
