"""What a ledger says of a layer beside its errors: histograms, sizes, and what feeds what.

For every flow that looks at a model and observes its layers' inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from amct_pytorch.graph.layers import LAYER_KINDS, SeenLayer
from amct_pytorch.graph.look import ModelGraph
from amct_pytorch.graph.trace import OpCall, Operand
from amct_pytorch.observers.hfmg import rebinned
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.report.ledger import InputHistogram, LayerEntry
from amct_pytorch.report.network import Network, Operation, network_of

# Bins of the histograms in a ledger: enough to see a shape by, few enough for a small file.
BINS = 64


def describe_input(entry: LayerEntry, factors: LayerFactors, observed: Histogram) -> None:
    """Adds what was observed at a layer's input, and what it becomes."""
    entry.input_bits = factors.activation_bits
    if observed.total and math.isfinite(observed.high - observed.low):
        if observed.low < observed.high:
            counts = [round(count) for count in rebinned(observed, BINS).counts.tolist()]
        else:
            counts = [observed.total]
        entry.input_histogram = InputHistogram(observed.low, observed.high, counts)


def describe_size(entry: LayerEntry, layer: SeenLayer, output_shape: Sequence[int] | None) -> None:
    """Adds the shapes of a layer's weight and output, and its work on one sample.

    Args:
        entry: of the layer.
        layer: what a look at the model found.
        output_shape: of its output on a batch; None: not known.
    """
    kind = LAYER_KINDS[layer.kind]
    if layer.weight_shape:
        entry.weight_shape = list(layer.weight_shape)
    if output_shape is None:
        return
    entry.output_shape = list(output_shape)
    if not kind.weighted or not output_shape or not layer.input_shape:
        return
    # Each weight is used at every position: of the output, or of a transposed layer's input.
    shape = list(layer.input_shape if kind.transposed else output_shape)
    shape[kind.channel_axis] = 1
    entry.macs = math.prod(layer.weight_shape) * math.prod(shape[1:])


def traced_network(graph: ModelGraph) -> Network | None:
    """Which layers feed which, from one run; None for a network too large to draw."""
    names = {call.index: name for name, call in graph.calls.items()}
    trace = graph.trace
    read = {value for call in trace.ops for value in call.inputs}
    made = {value for call in trace.ops for value in call.outputs}
    held = {*trace.parameter_values.values(), *trace.untraced, *trace.constants}
    given = sorted((read | set(trace.outputs)) - made - held)
    inputs = [(f"input {i}" if len(given) > 1 else "input", v) for i, v in enumerate(given)]
    outputs = [
        (f"output {i}" if len(trace.outputs) > 1 else "output", value)
        for i, value in enumerate(trace.outputs)
    ]
    operations = [_operation(call, names.get(call.index)) for call in trace.ops]
    return network_of(inputs, operations, outputs)


def _operation(call: OpCall, layer: str | None) -> Operation:
    if layer is None:
        return Operation(call.function.strip("_"), call.inputs, call.outputs)
    # What a layer computes its weight from is no edge.
    data = call.argument(0, "input")
    inputs = (data.value,) if isinstance(data, Operand) else call.inputs
    return Operation(call.function, inputs, call.outputs, layer)
