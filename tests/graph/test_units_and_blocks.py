"""Units, chains and blocks, named by structure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amct_pytorch.errors import ModelError
from amct_pytorch.graph.blocks import cut, find_block
from amct_pytorch.graph.look import ModelGraph, copy_model, layer_calls, look_at
from amct_pytorch.graph.replay import Replay
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.units import Units


def unit(inputs: int, outputs: int, activation: nn.Module | None = None) -> list[nn.Module]:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
    return layers if activation is None else [*layers, activation]


class Cascade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *unit(3, 4, nn.ReLU(inplace=True)),
            *unit(4, 6, nn.ReLU6()),
            nn.MaxPool2d(2),
            *unit(6, 4),
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.body(x))
        return self.head(y.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Sequential(*unit(4, 4, nn.ReLU()))
        self.second = nn.Sequential(*unit(4, 4))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(F.relu(x + self.second(self.first(x))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.squeeze = nn.Conv2d(4, 2, 1)
        self.excite = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, self.bias)


class OwnForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Standardised(3, 4, 3)
        self.b = Standardised(4, 4, 3)
        self.scale = torch.tensor([0.5])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.leaky_relu(self.a(x), 0.1)) * self.scale


def looked(model: nn.Module) -> ModelGraph:
    torch.manual_seed(0)
    return look_at(model, ModelInputs.of(torch.randn(2, 3, 8, 8)))


@pytest.mark.parametrize(
    ("model", "chains"),
    [
        (Cascade(), [["body.0", "body.3", "body.7", "head"]]),
        (Residual(), [["stem"], ["first.0", "second.0"], ["last"]]),
        (SqueezeExcite(), [["conv"], ["squeeze", "excite"]]),
        (OwnForward(), [["a", "b"]]),
    ],
    ids=["cascade", "residual", "squeeze-excite", "own-forward"],
)
def test_chains(model: nn.Module, chains: list[list[str]]) -> None:
    graph = looked(model)
    names = [layer.name for layer in graph.layers]
    assert Units(graph.trace, graph.calls).chains(names) == chains


def test_pieces_of_a_chain() -> None:
    assert cut("abcde", 2) == [["a", "b"], ["c", "d"], ["e"]]


@pytest.mark.parametrize(
    ("model", "start", "end", "layers"),
    [
        (Cascade(), "body.3", "body.7", ("body.3", "body.7")),
        (Cascade(), "body.0", "head", ("body.0", "body.3", "body.7", "head")),
        (Residual(), "first.0", "second.0", ("first.0", "second.0")),
        (Residual(), "stem", "last", ("stem", "first.0", "second.0", "last")),
        (Residual(), "first.0", "last", ("first.0", "second.0", "last")),
        (OwnForward(), "a", "b", ("a", "b")),
    ],
    ids=[
        "activation-at-the-end",
        "whole",
        "branch",
        "around-a-residual",
        "residual",
        "own-forward",
    ],
)
def test_a_block_run_by_itself_makes_what_it_makes_in_the_network(
    model: nn.Module, start: str, end: str, layers: tuple[str, ...]
) -> None:
    model = copy_model(model)
    graph = look_at(model, inputs := ModelInputs.of(torch.randn(2, 3, 8, 8)))
    block = find_block(graph.trace, graph.calls, start, end)
    assert block.layers == layers
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        whole = Replay(graph.trace, inputs.copied(), tensors, keep=[block.result])
        whole.advance(block.ops[-1].index + 1)
        expected = whole.take(block.result).clone()
        part = Replay(graph.trace, inputs.copied(), tensors)
        part.advance(block.begin)
        entry = part.value(block.entry).clone()
        result = part.run_part(block.ops, {block.entry: entry}, block.result)
        assert torch.equal(result, expected)
        # The run goes on as if nothing had happened.
        part.advance(len(graph.trace.ops))
        assert torch.equal(part.value(graph.trace.outputs[0]), model(*inputs.args))


@pytest.mark.parametrize(
    ("model", "start", "end", "words"),
    [
        (Residual(), "second.0", "last", "2 tensors go into it"),
        (Residual(), "second.0", "first.0", "does not run on what"),
        (SqueezeExcite(), "conv", "excite", "2 tensors of it are used outside"),
    ],
    ids=["shortcut-enters", "wrong-order", "shortcut-leaves"],
)
def test_what_is_no_block_is_refused(model: nn.Module, start: str, end: str, words: str) -> None:
    graph = looked(model)
    with pytest.raises(ModelError, match=words):
        find_block(graph.trace, graph.calls, start, end)


def test_calls_of_a_second_run_are_the_same_layers() -> None:
    graph = looked(Cascade())
    assert layer_calls(graph.trace, graph.layers) == graph.calls
