"""The quantizer of inputs: how its range starts, what it keeps, and how it recovers."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle

import pytest
import torch
from torch import Tensor

from amct_pytorch.algorithms.solve import fp16_scale
from amct_pytorch.errors import CalibrationError
from amct_pytorch.formats import INT8
from amct_pytorch.nn.fake_quant import ActivationFakeQuant
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.range_search import SearchSettings, search_range


def batches(count: int, *, relu: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    data = [torch.randn(4, 6, 5, 5, generator=generator) * (i + 1) for i in range(count)]
    return [x.relu() for x in data] if relu else data


def test_the_range_is_that_of_calibration_and_the_first_batches_pass():
    quantizer, data = ActivationFakeQuant(batch_num=3), batches(4)
    histogram = Histogram()
    for x in data[:3]:
        assert not quantizer.ready
        assert torch.equal(quantizer(x), x)
        histogram.update(x)
    scale, offset = search_range(histogram, SearchSettings(), INT8, symmetric=False)
    found = quantizer.factors()
    assert found[1] == offset
    # Clip values are float32: their difference over 255 may be the next float32 to the scale.
    assert math.isclose(found[0], scale, rel_tol=2e-7)
    quantized = quantizer(data[3])
    expected = INT8.fake_quantize(data[3], torch.tensor(found[0]), found[1])
    # By the inverse of the scale: a step off only where the quotient is next to a half.
    assert ((quantized - expected).abs() > 1e-6).float().mean() < 1e-3


def test_the_forward_quantizes_with_the_factors_of_the_record():
    quantizer = ActivationFakeQuant()
    data = batches(2)
    quantizer(data[0])
    scale, offset = quantizer.factors()
    steps = INT8.steps_by_inverse(data[1], float(torch.tensor(1.0) / torch.tensor(scale)), offset)
    assert torch.equal(quantizer(data[1]), steps * scale)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("fixed_min", [None, True, False])
def test_fixed_min(relu, fixed_min):
    quantizer = ActivationFakeQuant(fixed_min=fixed_min)
    (x,) = batches(1, relu=relu)
    quantizer(x)
    assert quantizer.fixed_min == (relu if fixed_min is None else fixed_min)
    if quantizer.fixed_min or relu:
        assert quantizer.clip_min.item() == 0
        assert quantizer.factors()[1] == -128
    else:
        assert quantizer.clip_min.item() < 0


@pytest.mark.parametrize("relu", [False, True])
def test_a_clip_min_that_was_found_to_be_fixed_never_moves(relu):
    quantizer = ActivationFakeQuant()
    data = batches(3, relu=relu)
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.01, momentum=0.9)
    for x in data:
        optimizer.zero_grad()
        quantizer(x.requires_grad_()).square().sum().backward()
        optimizer.step()
    assert (quantizer.clip_min.item() == 0) is relu
    assert all(p.grad is not None for p in quantizer.parameters())  # for DistributedDataParallel


def test_given_clip_values_are_where_it_starts():
    quantizer = ActivationFakeQuant(clip_max=2.0, clip_min=-1.0)
    assert quantizer.ready
    scale, offset = quantizer.factors()
    assert (scale, offset) == INT8.range_factors(-1.0, 2.0, symmetric=False)
    half = ActivationFakeQuant(clip_max=2.0)
    assert not half.ready
    half(batches(1)[0])
    assert half.clip_max.item() == 2
    assert half.clip_min.item() < 0
    assert ActivationFakeQuant(clip_max=2.0, fixed_min=True).ready


def test_a_symmetric_range_follows_clip_max():
    quantizer = ActivationFakeQuant(symmetric=True)
    (x,) = batches(1)
    quantizer(x)
    assert quantizer.factors()[1] == 0
    with torch.no_grad():
        quantizer.clip_max.fill_(1.27)
    assert math.isclose(quantizer.factors()[0], 0.01, rel_tol=1e-6)
    quantizer(x)
    assert quantizer.clip_min.item() == -quantizer.clip_max.item()
    assert ActivationFakeQuant(symmetric=True, clip_max=1.0, clip_min=-2.0).factors()[0] > 2 / 129


def test_zeros_only():
    quantizer = ActivationFakeQuant()
    quantizer(torch.zeros(5))
    assert quantizer.factors() == (1.0, -128)
    assert torch.equal(quantizer(torch.zeros(5)), torch.zeros(5))


def test_a_scale_of_float16():
    quantizer = ActivationFakeQuant(float16_scale=True, clip_max=1.0, clip_min=-0.31)
    exact = ActivationFakeQuant(clip_max=1.0, clip_min=-0.31).factors()
    assert quantizer.factors() == (fp16_scale(exact[0]), exact[1])
    x = torch.linspace(-0.2, 0.9, 50)
    steps = quantizer(x) / quantizer.factors()[0]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    for clips in ((1.0, -0.31), (3e-6, 0.0), (1e8, -1e7)):
        changed = ActivationFakeQuant(float16_scale=True, clip_max=clips[0], clip_min=clips[1])
        scale, offset = changed._tensor_factors()
        assert (float(scale), int(offset)) == changed.factors()


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ((math.nan, -0.5), (1.0, -0.5)),
        ((-0.1, -0.5), (1.0, -0.5)),
        ((2.0, 0.3), (2.0, -0.5)),
        ((2.0, -math.inf), (1.0, -0.5)),
        ((1e-8, -1e-9), (1.0, -0.5)),
        ((3.0, -1.0), (3.0, -1.0)),
    ],
)
@pytest.mark.parametrize("plain", [True, False])
def test_clip_values_that_went_astray_are_put_back(broken, expected, plain, caplog):
    quantizer = ActivationFakeQuant(clip_max=1.0, clip_min=-0.5)
    x = torch.linspace(-1, 1, 20)
    quantizer(x)
    with torch.no_grad():
        quantizer.clip_max.fill_(broken[0])
        quantizer.clip_min.fill_(broken[1])
    counted = INT8.range_factors(expected[1], expected[0], symmetric=False)
    # They count at once, also for who only reads them, and are changed by training only.
    assert quantizer.factors() == counted
    quantizer.eval()(x)
    left = torch.tensor(broken[0])
    assert torch.equal(quantizer.clip_max.detach().nan_to_num(7), left.nan_to_num(7))
    quantizer.train()
    with caplog.at_level(logging.WARNING, logger="amct_pytorch"):
        if plain:
            quantizer(x)
        else:
            scale, offset = quantizer._tensor_factors()
            assert (float(scale), int(offset)) == counted
    clips = (quantizer.clip_max.item(), quantizer.clip_min.item())
    assert clips == pytest.approx(expected)
    assert quantizer.good_clips.tolist() == pytest.approx(list(expected))
    assert ("put back" in caplog.text) == (plain and expected[0] != broken[0])


def test_stopping_at_any_batch_and_going_on_is_the_same():
    data = batches(6)

    def run(quantizer: ActivationFakeQuant, part: list[Tensor]) -> list[Tensor]:
        optimizer = torch.optim.SGD(quantizer.parameters(), 0.001)
        results = []
        for x in part:
            optimizer.zero_grad()
            y = quantizer(x)
            y.square().sum().backward()
            optimizer.step()
            results.append(y.detach())
        return results

    whole = ActivationFakeQuant(batch_num=3)
    results = run(whole, data)
    for stop in range(7):
        first = ActivationFakeQuant(batch_num=3)
        run(first, data[:stop])
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        second = ActivationFakeQuant(batch_num=3)
        second.load_state_dict(torch.load(buffer, weights_only=True))
        for found, expected in zip(run(second, data[stop:]), results[stop:], strict=True):
            assert torch.equal(found, expected)
        assert second.factors() == whole.factors()
        assert all(isinstance(value, Tensor) for value in second.state_dict().values())


def test_copies_are_independent():
    quantizer = ActivationFakeQuant(batch_num=2)
    data = batches(3)
    quantizer(data[0])
    for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        copied(data[1])
        assert copied.ready
        assert not quantizer.ready
    quantizer(data[2])
    assert quantizer.factors() != copied.factors()


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    quantizer = ActivationFakeQuant()
    for x in batches(2):
        quantizer(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_data_is_told_with_its_place():
    quantizer = ActivationFakeQuant(name="conv1", batch_num=2)
    quantizer(torch.ones(3))
    with pytest.raises(
        CalibrationError, match=r"'conv1' holds NaN or infinity in training batch 2"
    ):
        quantizer(torch.tensor([1.0, math.nan]))
    with pytest.raises(CalibrationError, match=r"'conv1' is not known: 1 of batch_num 2"):
        quantizer.factors()
    with pytest.raises(CalibrationError, match="all was empty"):
        ActivationFakeQuant()(torch.empty(0, 3))


def test_memory_stays_the_same_over_batches():
    quantizer = ActivationFakeQuant(batch_num=50)
    for x in batches(20):
        quantizer(x)
    first = quantizer.get_extra_state().numel()
    for x in batches(20):
        quantizer(x)
    assert quantizer.get_extra_state().numel() == first
