"""What a structure's case is made of, and the building blocks of the small networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.graph.tensors import ModelInputs

Forward = Callable[..., Any]


class Net(nn.Module):
    """Submodules by name and a forward given as a function of the module and its inputs."""

    def __init__(self, run: Forward, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(cin: int = 4, cout: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(cin, cout, kernel, **options)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return lively(nn.BatchNorm2d(channels))


def lively(bn: Any) -> Any:
    """A BatchNorm that changes its input, as a trained one does."""
    with torch.no_grad():
        for tensor, low, high in (
            (bn.running_mean, -0.5, 0.5),
            (bn.running_var, 0.3, 2.0),
            (bn.weight, 0.5, 1.5),
            (bn.bias, -0.5, 0.5),
        ):
            tensor.uniform_(low, high)
    return bn


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 8, 8)))


@dataclass
class Case:
    """A network and what a look at it must find.

    Attributes:
        model: in training mode, as a fresh module is.
        inputs: as the user's `input_data`.
        quantizable: names of the layers that can be quantized.
        left_out: for each other layer, part of the reason.
        fused: BatchNorm that can be folded into each layer.
    """

    model: nn.Module
    inputs: Any
    quantizable: set[str]
    left_out: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)


CASES: dict[str, Callable[[], Case]] = {}


def structure(function: Callable[[], Case]) -> Callable[[], Case]:
    """Registers a case under its function's name; it is made from a fixed seed."""

    def make() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function()

    CASES[function.__name__] = make
    return function


def fresh(name: str) -> Case:
    """The case of that name, newly made, its model in eval mode."""
    case = CASES[name]()
    case.model.eval()
    return case


def float_output(case: Case) -> Any:
    """What an untouched copy of the case's model returns."""
    model = copy.deepcopy(case.model).eval()
    with torch.no_grad():
        return ModelInputs.of(case.inputs).copied().call(model)
