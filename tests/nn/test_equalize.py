"""Factors between layers: exact in float, and what they are for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amct_pytorch.algorithms.balance import balanced_weight, input_channel_maxima
from amct_pytorch.graph.look import kind_of, look_at
from amct_pytorch.graph.pairs import scalable_pairs
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.nn.equalize import equalize, move_factors
from amct_pytorch.nn.wrapped import CompressedLayer

SECONDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 8), lambda: nn.Linear(8, 3), (4, 5)),
    "Conv2d": (lambda: nn.Conv2d(5, 8, 3), lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 5, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 1), lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 4, 9, 9)),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 8, 2, groups=2),
        lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
        (2, 6, 5, 5),
    ),
}


def wrapped(module: nn.Module, name: str) -> CompressedLayer:
    kind = kind_of(module)
    assert kind is not None
    bias = module.bias
    assert isinstance(bias, Tensor)
    groups = int(getattr(module, "groups", 1))
    return CompressedLayer(name, kind, module, module.weight, bias, groups)


def pair(name: str) -> tuple[CompressedLayer, CompressedLayer, Tensor]:
    first, second, shape = SECONDS[name]
    layers = wrapped(first().double(), "first"), wrapped(second().double(), "second")
    return *layers, torch.randn(shape, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(SECONDS)), seed=st.integers(0, 10**6), size=st.floats(0.1, 8))
def test_moving_factors_leaves_the_result_as_it_is(name: str, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    first, second, x = pair(name)
    with torch.no_grad():
        before = second(torch.relu(first(x)))
        factors = (size * torch.randn(8, dtype=torch.float64)).exp()
        move_factors(first, second, factors)
        after = second(torch.relu(first(x)))
    # Float64 rounds to 1e-16; sums of terms that cancel lose a few digits of that.
    assert float((after - before).norm()) <= 1e-12 * float(before.norm())


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(SECONDS)), seed=st.integers(0, 10**6))
def test_balancing_leaves_the_result_as_it_is(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    _, second, _ = pair(name)
    assert second.layout is not None
    factors = torch.randn(8, dtype=torch.float64).exp()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    if name == "Linear":
        x = x.movedim(1, -1)
    weight = balanced_weight(second.layout, second.groups, second.weight, factors)
    with torch.no_grad():
        before = second(x)
        second.weight.copy_(weight)
        after = second(x / second.per_channel(factors, x))
    assert float((after - before).norm()) <= 1e-12 * float(before.norm())


@pytest.mark.parametrize("name", SECONDS)
def test_equalized_channels_have_equal_ranges_in_both_layers(name: str) -> None:
    torch.manual_seed(0)
    first, second, x = pair(name)
    assert first.layout is not None and second.layout is not None
    with torch.no_grad():
        before = second(torch.relu(first(x)))
        notes = equalize({"first": first, "second": second}, {"second": "first"})
        after = second(torch.relu(first(x)))
    torch.testing.assert_close(after, before)
    mine = first.layout.rows(first.weight).abs().amax(1).float()
    others = input_channel_maxima(second.layout, second.groups, second.weight)
    torch.testing.assert_close(mine, others, rtol=2e-3, atol=0)
    assert notes == {
        "first": "outputs equalized with second",
        "second": "inputs equalized with first",
    }


def test_channels_without_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    first, second, x = pair("Linear")
    with torch.no_grad():
        first.weight[2] = 0
        second.weight[:, 5] = 0
        before = second(torch.relu(first(x)))
        equalize({"first": first, "second": second}, {"second": "first"})
        torch.testing.assert_close(second(torch.relu(first(x))), before)
    assert not bool(first.weight[2].any() or second.weight[:, 5].any())


class Ways(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.e, self.f = nn.Conv2d(8, 4, 1), nn.Linear(4, 6)
        self.g, self.h = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.b(torch.nn.functional.max_pool2d(self.a(x).relu_(), 2))))
        x = x + self.c(x)  # b is read twice
        x = self.e(torch.nn.functional.relu6(self.d(x)))  # not homogeneous
        x = self.f(x.mean((2, 3)))  # a mean is not on the list, and the axis changes
        x = torch.nn.functional.leaky_relu(self.g(x))
        return self.h(x)


def test_pairs_are_found_where_a_factor_can_be_moved_and_nowhere_else() -> None:
    graph = look_at(Ways().eval(), ModelInputs.of(torch.randn(2, 3, 8, 8)))
    names = [layer.name for layer in graph.layers]
    assert scalable_pairs(graph, names, {"b"}) == {"b": "a", "g": "f", "h": "g"}
    assert scalable_pairs(graph, ["b", "h"], {"b"}) == {}


def test_a_norm_that_is_not_fused_is_no_way_through() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()
    graph = look_at(model, ModelInputs.of(torch.randn(2, 3, 4, 4)))
    assert scalable_pairs(graph, ["0", "3"], set()) == {}
    assert scalable_pairs(graph, ["0", "3"], {"0"}) == {"3": "0"}
