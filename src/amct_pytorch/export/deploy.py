"""The deploy model: what Ascend's ATC reads (AscendQuant, integer layers, AscendDequant)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import TensorProto

from amct_pytorch.export.integer_layer import IntegerLayer, integer_layers, pack_param
from amct_pytorch.export.layer_nodes import LayerFinder
from amct_pytorch.export.onnx_graph import OnnxGraph, set_attribute
from amct_pytorch.export.opset import IR_VERSION, plain_model
from amct_pytorch.record.factors import LayerFactors

EXTRA_RANGES = "amct.extra_ranges"
# AscendDequant's `dtype` by ONNX type of the result.
DEQUANT_TYPES: dict[int, int] = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 1}


def build_deploy(
    float_model: onnx.ModelProto, factors: Mapping[str, LayerFactors]
) -> onnx.ModelProto:
    """The deploy model of a float model and its factors.

    A layer L becomes AscendQuant ``L.quant`` -> L with int8 weights and int32 bias ->
    AscendDequant ``L.dequant``. Two AscendQuant on one tensor with equal factors are one.
    Weights of 6 and 7 bits are stored as int8; of 4 bits, two in a byte, neighbours along the
    input channels, the even one in the low half.

    Args:
        float_model: float32 or float16 ONNX whose layers' nodes (see `WRITERS`) carry the name
            of their layer in metadata `amct.layer`; not changed.
        factors: of every layer to quantize, by name; the other layers stay float.

    Returns:
        A model of opset 18 (higher only where an operator needs it) and IR version 8, with
        no metadata but the float model's `amct.extra_ranges`.

    Raises:
        RecordError: factors missing, out of range, or of layers the model does not have.
        ExportError: a layer cannot be deployed; the message names it.
    """
    model = rewritten(float_model, factors, _add_quant, _write_layer, _add_dequant)
    for entry in float_model.metadata_props:
        if entry.key == EXTRA_RANGES:
            model.metadata_props.add(key=entry.key, value=entry.value)
    return model


def rewritten(
    float_model: onnx.ModelProto,
    factors: Mapping[str, LayerFactors],
    add_quant: Callable[[OnnxGraph, IntegerLayer], str],
    write_layer: Callable[[OnnxGraph, IntegerLayer], None],
    add_dequant: Callable[[OnnxGraph, IntegerLayer], None],
) -> onnx.ModelProto:
    """A float model with every layer that has factors put on integers.

    Args:
        float_model: as for `build_deploy`; not changed.
        factors: as for `build_deploy`.
        add_quant: adds what quantizes a layer's input and returns the tensor it yields; called
            once for layers that share a tensor and its factors.
        write_layer: puts the integers into the layer's node.
        add_dequant: adds what makes real values of the layer's result.

    Raises:
        RecordError, ExportError: as for `build_deploy`.
    """
    plain, opset = plain_model(float_model)
    graph = OnnxGraph(plain)
    quantized: dict[tuple[str, bytes, int, str], str] = {}
    for layer in integer_layers(LayerFinder(graph), factors):
        node = layer.layer.node
        key = (str(node.input[0]), *layer.quantizer)
        if key not in quantized:
            quantized[key] = add_quant(graph, layer)
        node.input[0] = quantized[key]
        node.name = layer.layer.name
        write_layer(graph, layer)
        add_dequant(graph, layer)
    return graph.model(opset=opset, ir_version=IR_VERSION)


def _write_layer(graph: OnnxGraph, layer: IntegerLayer) -> None:
    if layer.weight is not None and layer.weight_format.bits == 4:
        axis = layer.layer.layout.in_axis
        packed = layer.weight_format.pack(torch.from_numpy(layer.weight), axis)
        layer = replace(layer, weight=packed.numpy().view(np.int8))
    WRITERS[layer.layer.node.op_type](graph, layer)


def split_output(graph: OnnxGraph, layer: IntegerLayer, scaled: str) -> tuple[str, str]:
    """Part a layer's raw output from the scaled one that the rest of the graph reads.

    Args:
        graph: the graph being edited; readers of the layer's output are moved.
        layer: the layer.
        scaled: name wanted for the scaled output.

    Returns:
        Names of the raw and of the scaled tensor. The raw one keeps its name, except where
        that is a graph output, which the scaled one then is.
    """
    raw = layer.layer.output
    if raw in graph.output_names:
        graph.forget_type(raw)
        new = graph.fresh(f"{layer.layer.name}.output0")
        layer.layer.last.output[0] = new
        return new, raw
    scaled = graph.fresh(scaled)
    graph.replace_reads(raw, scaled)
    # A reader of the file tells two weights in a byte by the shape of what they multiply.
    graph.move_type(raw, scaled)
    return raw, scaled


def _add_quant(graph: OnnxGraph, layer: IntegerLayer) -> str:
    name = f"{layer.layer.name}.quant"
    output = graph.fresh(f"{name}.output0")
    graph.add(
        "AscendQuant",
        [layer.layer.node.input[0]],
        [output],
        name=graph.fresh(name),
        scale=float(layer.inverse_scale),
        offset=float(layer.offset),
        dst_type=layer.activation.record_name,
    )
    return output


def _add_dequant(graph: OnnxGraph, layer: IntegerLayer) -> None:
    name = f"{layer.layer.name}.dequant"
    raw, scaled = split_output(graph, layer, f"{name}.output0")
    param = graph.set_array(graph.fresh(f"{name}.param"), pack_param(layer.dequant_scale))
    dtype = DEQUANT_TYPES[layer.layer.float_type]
    graph.add("AscendDequant", [raw, param], [scaled], name=graph.fresh(name), dtype=dtype)


def set_operand(
    graph: OnnxGraph, node: onnx.NodeProto, index: int, name: str, value: np.ndarray
) -> None:
    """Give one node a constant of its own, under its old name where nobody else reads that.

    Args:
        graph: the graph being edited.
        node: the node.
        index: which of its inputs.
        name: what that input is called now.
        value: the constant.
    """
    constant = name in graph.initializers and graph.count_reads(name) == 1
    node.input[index] = graph.set_array(name if constant else graph.fresh(name), value)


def write_conv(graph: OnnxGraph, layer: IntegerLayer) -> None:
    """Conv or ConvTranspose with integer weight and bias."""
    node = layer.layer.node
    assert layer.weight is not None
    set_operand(graph, node, 1, layer.layer.weight_name, layer.weight)
    if layer.bias is not None and layer.layer.bias_name is not None:
        set_operand(graph, node, 2, layer.layer.bias_name, layer.bias)


def write_gemm(graph: OnnxGraph, layer: IntegerLayer) -> None:
    """Gemm with weights [K, N], alpha and beta 1."""
    write_conv(graph, layer)
    node = layer.layer.node
    set_attribute(node, "transB", 0)
    set_attribute(node, "alpha", 1.0)
    set_attribute(node, "beta", 1.0)


def write_matmul(graph: OnnxGraph, layer: IntegerLayer) -> None:
    """MatMul, and the Add of its integer bias."""
    found = layer.layer
    assert layer.weight is not None
    set_operand(graph, found.node, 1, found.weight_name, layer.weight)
    if layer.bias is not None and found.bias_name is not None:
        index = list(found.last.input).index(found.bias_name)
        set_operand(graph, found.last, index, found.bias_name, layer.bias)


def write_pool(graph: OnnxGraph, layer: IntegerLayer) -> None:
    """AveragePool as it is: it works on the integers of its input and yields their mean."""


# How each operator takes its integers. A new kind of layer is one more row.
WRITERS: dict[str, Callable[[OnnxGraph, IntegerLayer], None]] = {
    "Conv": write_conv,
    "ConvTranspose": write_conv,
    "Gemm": write_gemm,
    "MatMul": write_matmul,
    "AveragePool": write_pool,
}
