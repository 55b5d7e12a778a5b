"""The activation directly behind a layer."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.graph.look import ModelGraph
from amct_pytorch.graph.trace import Operand

# By the name of the torch function (those that work in place have a "_" behind it): the function,
# and how many settings stand behind the data; what follows them is `training` and `inplace`.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "relu": (F.relu, 0),
    "relu6": (F.relu6, 0),
    "hardtanh": (F.hardtanh, 2),
    "clamp": (torch.clamp, 2),
    "leaky_relu": (F.leaky_relu, 1),
    "rrelu": (F.rrelu, 2),
    "prelu": (F.prelu, 1),
    "elu": (F.elu, 1),
    "gelu": (F.gelu, 0),
    "silu": (F.silu, 0),
    "hardswish": (F.hardswish, 0),
    "sigmoid": (torch.sigmoid, 0),
    "tanh": (torch.tanh, 0),
}
NOT_SETTINGS = ("input", "inplace", "training")


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its settings.

    Attributes:
        name: the torch function's.
        function: that function.
        args: what it takes behind the data.
        kwargs: likewise.
    """

    name: str
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        """Of [rows, channels]."""
        return self.function(x, *self.args, **self.kwargs)


def following_activations(
    graph: ModelGraph, names: Iterable[str], fused: Container[str], model: nn.Module
) -> dict[str, Activation]:
    """The activation that is the only reader of a layer's output, where there is one.

    Args:
        graph: what a look at the model found.
        names: layers of it.
        fused: those of which the BatchNorm behind it has become part.
        model: has the parameters of the activations.
    """
    kinds = {layer.name: LAYER_KINDS[layer.kind] for layer in graph.layers}
    parameters = dict(model.named_parameters())
    found = {}
    for name in names:
        activation = _following(graph, name, name in fused, parameters, kinds[name].channel_axis)
        if activation is not None:
            found[name] = activation
    return found


def _following(
    graph: ModelGraph,
    layer: str,
    fused: bool,
    parameters: Mapping[str, nn.Parameter],
    channel_axis: int,
) -> Activation | None:
    trace = graph.trace
    (value,) = graph.calls[layer].outputs
    readers = trace.consumers(value)
    if fused and len(readers) == 1:
        (value,) = readers[0].outputs
        readers = trace.consumers(value)
    if len(readers) != 1 or value in trace.outputs:
        return None
    call = readers[0]
    name = call.function.rstrip("_")
    x = call.argument(0, "input")
    if name not in FUNCTIONS or not isinstance(x, Operand) or x.value != value:
        return None
    function, number = FUNCTIONS[name]
    args = call.args[1 : 1 + number]
    kwargs = {key: arg for key, arg in call.kwargs.items() if key not in NOT_SETTINGS}
    operands = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Operand)]
    if operands:
        # One slope, or one for each channel where that is the axis of a row too; prelu's is axis
        # 1, which is the last one only of a Linear's two. Other tensors need not fit.
        slope = parameters.get(operands[0].parameter or "")
        if name != "prelu" or slope is None:
            return None
        if slope.numel() > 1 and channel_axis != 1 and len(x.shape) != 2:
            return None
        args, kwargs = (slope.detach(),), {}
    return Activation(name, function, tuple(args), kwargs)


def behind_relu(graph: ModelGraph, layer: str) -> bool:
    """Whether what a layer reads is the result of a ReLU, in whatever form it was called."""
    x = graph.calls[layer].argument(0, "input")
    makers = [op for op in graph.trace.ops if isinstance(x, Operand) and x.value in op.outputs]
    if not makers:
        return False
    call = makers[-1]
    name = call.function.rstrip("_")
    if name == "clamp":
        return _number(call.argument(1, "min")) == 0.0 and call.argument(2, "max") is None
    if name == "clamp_min":
        return _number(call.argument(1, "min")) == 0.0
    if name == "threshold":
        return _number(call.argument(1, "threshold")) == _number(call.argument(2, "value")) == 0.0
    return name == "relu"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
