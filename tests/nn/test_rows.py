"""A layer's call as a product of matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from amct_pytorch.graph.look import kind_of
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.rows import (
    choose_positions,
    input_rows,
    output_rows,
    row_values,
    weight_from_matrices,
    weight_matrices,
)
from amct_pytorch.nn.wrapped import CompressedLayer, Stage

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear 3-D": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 9)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 2)), (2, 4, 9, 11)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, (2, 4), padding="valid"), (2, 4, 9, 8)),
    "same, even": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 5, groups=4, padding=2), (2, 4, 7, 7)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5, 6),
    ),
    "transposed, dilated": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), dilation=(2, 1)),
        (2, 4, 5, 6),
    ),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2),
        (2, 4, 5, 6),
    ),
}


class Keep(Stage):
    call: LayerCall

    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        self.call = call
        return layer.float_result(call)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrices_are_the_layer(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    module = build().double()
    kind = kind_of(module)
    assert kind is not None
    groups = getattr(module, "groups", 1)
    layer = CompressedLayer(name, kind, module, module.weight, None, groups)
    layer.stage = keep = Keep()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    matrices = weight_matrices(layer, layer.weight)
    assert torch.equal(weight_from_matrices(layer, matrices), layer.weight)
    for number in (10**6, 13):
        positions = choose_positions(y, kind.channel_axis, number, seed=3)
        assert len(positions.unique()) == len(positions)
        rows = input_rows(layer, keep.call, keep.call.x, positions)
        assert rows[:, 0].numel() == row_values(layer)
        product = (rows @ matrices).transpose(0, 1).flatten(1)
        torch.testing.assert_close(product, output_rows(y, positions, kind.channel_axis))
    assert len(positions) == min(13, y.numel() // y.shape[kind.channel_axis])


def test_positions_are_spread_over_all_items_and_the_same_for_a_seed() -> None:
    y = torch.zeros(8, 3, 10, 10)
    positions = choose_positions(y, 1, 40, seed=1)
    assert torch.equal(positions // 100, torch.arange(8).repeat_interleave(5))
    assert torch.equal(positions, choose_positions(y, 1, 40, seed=1))
    assert not torch.equal(positions, choose_positions(y, 1, 40, seed=2))
