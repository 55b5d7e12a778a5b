"""Layers between which a factor can be moved: each output channel of one is read by the other only.

What stands between them must be positively homogeneous, f(s x) = s f(x) for s > 0, and keep
channels apart.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.graph.look import ModelGraph
from amct_pytorch.graph.trace import Operand, Trace

# By the name of the torch function; those that work in place have the same name and "_".
HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "dropout", "contiguous"})
# These too, where channels are not on the axes that they go over.
POOLS = frozenset(
    {
        "max_pool2d",
        "max_pool3d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "dropout2d",
    }
)


def scalable_pairs(
    graph: ModelGraph, names: Iterable[str], fused: Container[str]
) -> dict[str, str]:
    """The layer before each layer, where a factor for each channel between them can be moved.

    Args:
        graph: what a look at the model found.
        names: the layers to look among.
        fused: those of which the BatchNorm behind it has become part.

    Returns:
        Names of first layers by those of second ones.
    """
    trace, kinds = graph.trace, {layer.name: layer for layer in graph.layers}
    names = [name for name in names if LAYER_KINDS[kinds[name].kind].weighted]
    makers = {value: op for op in trace.ops for value in op.outputs}
    ends = {}
    for name in names:
        (value,) = graph.calls[name].outputs
        readers = trace.consumers(value)
        if name in fused and len(readers) == 1 and _only_reader(trace, value):
            (value,) = readers[0].outputs
        ends[value] = name
    pairs = {}
    for name in names:
        operand = graph.calls[name].argument(0, "input")
        assert isinstance(operand, Operand)
        value = operand.value
        allowed = HOMOGENEOUS
        if LAYER_KINDS[kinds[name].kind].channel_axis == 1:
            allowed = HOMOGENEOUS | POOLS
        while _only_reader(trace, value):
            first = ends.get(value)
            if first is not None:
                if _channels_meet(kinds[first].kind, kinds[name].kind):
                    pairs[name] = first
                break
            maker = makers.get(value)
            if maker is None or maker.function.rstrip("_") not in allowed:
                break
            x = maker.argument(0, "input")
            if not isinstance(x, Operand):
                break
            value = x.value
    return pairs


def _only_reader(trace: Trace, value: int) -> bool:
    return len(trace.consumers(value)) == 1 and value not in trace.outputs


def _channels_meet(first: str, second: str) -> bool:
    """Whether the output channels of one kind of layer are the input channels of the other."""
    return LAYER_KINDS[first].channel_axis == LAYER_KINDS[second].channel_axis
