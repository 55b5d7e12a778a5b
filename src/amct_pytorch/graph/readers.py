"""What reads a layer's output."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from amct_pytorch.graph.look import ModelGraph

# Functions whose result is quantized as well as their input: they only move, select or clip
# values. (A fused batch_norm passes its input on.)
PASSING = frozenset(
    (
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "clamp",
        "clamp_",
        "reshape",
        "view",
        "flatten",
        "transpose",
        "permute",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "max_pool1d",
        "max_pool2d",
        "dropout",
        "dropout_",
        "cat",
        "concat",
        "pad",
    )
)


def layers_read_in_float(
    graph: ModelGraph, names: Collection[str], fused: Mapping[str, str]
) -> frozenset[str]:
    """Layers whose output something other than a quantized layer reads, and no such layer.

    A convolution that feeds a residual addition, say: no layer's input range bounds its
    output, so integer runtimes need a range of its own. Outputs that only leave the model
    are not counted.

    Args:
        graph: what a look at the model found.
        names: the layers to be quantized.
        fused: BatchNorm folded into each layer, by layer name.
    """
    trace = graph.trace
    inputs = {op.inputs[0] for name, op in graph.calls.items() if name in names}
    norms = set(fused.values())

    @functools.cache
    def reaches(value: int) -> tuple[bool, bool]:
        """Whether a quantized layer reads the value, and whether anything in float does."""
        layer, other = value in inputs, False
        for op in trace.consumers(value):
            if op.function in PASSING or (norms & set(op.scopes) and op.function == "batch_norm"):
                further = [reaches(output) for output in op.outputs]
                layer |= any(found for found, _ in further)
                other |= any(found for _, found in further)
            elif op.index not in calls:
                other = True
        return layer, other

    calls = {op.index for name, op in graph.calls.items() if name in names}
    found = set()
    for name in names:
        layer, other = reaches(graph.calls[name].outputs[0])
        if other and not layer:
            found.add(name)
    return frozenset(found)
