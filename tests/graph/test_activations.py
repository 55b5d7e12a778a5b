"""The activation that ADA takes together with the layer before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amct_pytorch.graph.activations import following_activations
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "Linear": (lambda: nn.Linear(5, 4), (3, 5), -1),
    "Linear 3-D": (lambda: nn.Linear(5, 4), (3, 2, 5), -1),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 4, 4), 1),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "RReLU": lambda: nn.RReLU(0.1, 0.4),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "PReLU": nn.PReLU,
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "ReLU6": nn.ReLU6,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "SiLU": nn.SiLU,
}


def found_in(model: nn.Module, shape: tuple[int, ...], fused: set[str]) -> dict:
    model.eval()
    graph = look_at(model, ModelInputs.of(torch.randn(shape)))
    return following_activations(graph, [layer.name for layer in graph.layers], fused, model)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_and_the_activation_behind_it_are_a_unit(layer: str, name: str) -> None:
    build, shape, axis = LAYERS[layer]
    model = nn.Sequential(build(), ACTIVATIONS[name]())
    found = found_in(model, shape, set())
    assert set(found) == {"0"}
    # It computes on rows [positions, channels] what the model does on its own shape.
    with torch.no_grad():
        y = 3 * torch.randn_like(model[0](torch.randn(shape)))
        rows = y.movedim(axis, -1).reshape(-1, 4)
        wanted = model[1](y.clone()).movedim(axis, -1).reshape(-1, 4)
        torch.testing.assert_close(found["0"](rows), wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_slopes_by_channel_are_taken_where_channels_are_those_of_a_row(layer: str) -> None:
    build, shape, axis = LAYERS[layer]
    channels = 2 if layer == "Linear 3-D" else 4  # prelu's axis is 1
    model = nn.Sequential(build(), nn.PReLU(channels))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.1, 0.9, channels))
    found = found_in(model, shape, set())
    assert set(found) == (set() if layer == "Linear 3-D" else {"0"})
    if found:
        with torch.no_grad():
            y = torch.randn_like(model[0](torch.randn(shape)))
            rows = y.movedim(axis, -1).reshape(-1, 4)
            wanted = model[1](y).movedim(axis, -1).reshape(-1, 4)
            torch.testing.assert_close(found["0"](rows), wanted)


class Ways(nn.Module):
    """Activations that are not a layer's alone, or not directly behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.pooled, self.plain = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.normed, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.read_twice(x)
        x = torch.relu(x) + x
        x = torch.relu(F.max_pool2d(self.pooled(x), 2))
        x = torch.relu(self.norm(self.normed(self.plain(x))))
        y = self.last(x)
        return y, torch.relu(y)


def test_no_unit_where_something_else_reads_the_output_or_stands_between() -> None:
    assert found_in(Ways(), (2, 3, 6, 6), set()) == {}
    # A BatchNorm that has become part of the layer is not between.
    found = found_in(Ways(), (2, 3, 6, 6), {"normed"})
    assert {name: one.name for name, one in found.items()} == {"normed": "relu"}
