"""ULQ: values on the grid, and gradients as the formulas say, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.nn.fake_quant.learned_clip import learned_clip, observed_only


def definition(
    x: Tensor, high: float, low: float, bits: int, symmetric: bool
) -> tuple[Tensor, ...]:
    """x^ and its derivatives by x, clip_max and clip_min, value by value, from the definition."""
    grid = IntFormat(bits)
    ends = torch.tensor([low, high], dtype=torch.float64)
    scale, offset = grid.factors(ends[0], ends[1], symmetric=symmetric)
    bottom, top = (grid.qmin - offset) * scale, (grid.qmax - offset) * scale
    u = x / scale
    q = (torch.round(u) + offset).clamp(grid.qmin, grid.qmax)
    above, below = x > top, x < bottom
    error = torch.where(above | below, 0.0, torch.round(u) - u)
    if symmetric:
        for_max = torch.where(
            above, 1.0, torch.where(below, grid.qmin / grid.qmax, error / grid.qmax)
        )
        for_min = torch.zeros_like(x)
    else:
        steps = 2**bits - 1
        for_max = torch.where(above, 1.0, torch.where(below, 0.0, error / steps))
        for_min = torch.where(below, 1.0, torch.where(above, 0.0, -error / steps))
    return (q - offset) * scale, (~(above | below)).double(), for_max, for_min


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("ends", [(1.3, -0.7), (2.0, 0.0), (0.0, -1.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_and_gradients_in_float64(bits, ends, symmetric):
    if symmetric:
        ends = (1.3, -1.3)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 7, 3, generator=generator).double() * 1.5).requires_grad_()
    weights = torch.randn(5, 7, 3, generator=generator).double()
    high, low = (torch.tensor(e, dtype=torch.float64, requires_grad=True) for e in ends)
    grid = IntFormat(bits)
    scale, offset = grid.factors(low.detach(), high.detach(), symmetric=symmetric)
    y = learned_clip(x, high, low, grid, scale, offset, symmetric=symmetric)
    found = torch.autograd.grad(y, [x, high, low], weights)

    value, by_x, by_max, by_min = definition(x.detach(), *ends, bits, symmetric)
    # The toolkit multiplies by 1 / s, the definition divides: one rounding of float64.
    torch.testing.assert_close(y.detach(), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], weights * by_x)
    torch.testing.assert_close(found[1], (weights * by_max).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], (weights * by_min).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 6, 9, 9), (1, 3, 70, 1000), (2, 3, 4, 5, 6), (0, 4)])
def test_plain_numbers_and_tensors_give_the_same(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(dtype)
    layouts = [x]
    if len(shape) == 4:
        layouts += [x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2]]
    grid, high, low = IntFormat(8), torch.tensor(1.1), torch.tensor(-0.6)
    scale, offset = grid.range_factors(float(low), float(high), symmetric=False)
    tensors = torch.tensor(scale), torch.tensor(offset)
    for given in layouts:
        weights = torch.randn(given.shape, generator=generator).to(dtype)
        results = []
        for factors in ((scale, offset), tensors):
            leaves = [t.clone().requires_grad_() for t in (given, high, low)]
            y = learned_clip(*leaves, grid, *factors, symmetric=False)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, weights)))
        for fast, slow in zip(results[0][:2], results[1][:2], strict=True):
            assert fast.dtype == dtype
            assert torch.equal(fast, slow)
        # Sums in another order, one of them in float32.
        for fast, slow in zip(results[0][2:], results[1][2:], strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-2)


def test_values_at_the_ends_are_inside():
    grid, high, low = IntFormat(8), torch.tensor(2.0), torch.tensor(0.0)
    scale, offset = grid.range_factors(0.0, 2.0, symmetric=False)
    top = (grid.qmax - offset) * scale
    x = torch.tensor([0.0, -0.0, top, top * 1.001, -1e-6], requires_grad=True)
    y = learned_clip(x, high, low, grid, scale, offset, symmetric=False)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 1, 1, 0, 0]


def test_nan_stays_nan():
    grid, high, low = IntFormat(8), torch.tensor(1.0), torch.tensor(-1.0)
    scale, offset = grid.range_factors(-1.0, 1.0, symmetric=False)
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    y = learned_clip(x, high, low, grid, scale, offset, symmetric=False)
    assert y[0].isnan()
    ends = torch.tensor([grid.qmax - offset, grid.qmin - offset])
    assert torch.equal(y[1:], ends * scale)


def test_only_the_input_is_kept_for_the_backward_pass():
    x = torch.randn(1000, requires_grad=True)
    high, low = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        learned_clip(x, high, low, IntFormat(8), 1 / 255, -128, symmetric=False)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_observing_gives_clip_values_zero_gradients():
    x = torch.randn(4, requires_grad=True)
    high, low = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    y = observed_only(x, high, low)
    grads = torch.autograd.grad(y.sum(), [x, high, low])
    assert torch.equal(y, x)
    assert [float(g.sum()) for g in grads] == [4, 0, 0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_factors_of_a_range_by_plain_numbers_are_those_of_tensors(bits, symmetric):
    grid = IntFormat(bits)
    generator = torch.Generator().manual_seed(2)
    ends = torch.randn(300, 2, generator=generator) * 10 ** torch.randn(300, 1, generator=generator)
    ends = torch.cat([ends, torch.tensor([[0.0, 0.0], [1e-9, -1e-9], [0.0, 1.0], [-1.0, 0.0]])])
    for first, second in ends.tolist():
        low, high = min(first, second), max(first, second)
        scale, offset = grid.factors(torch.tensor(low), torch.tensor(high), symmetric=symmetric)
        expected = (float(scale), int(offset))
        given = float(torch.tensor(low)), float(torch.tensor(high))
        assert grid.range_factors(*given, symmetric=symmetric) == expected
