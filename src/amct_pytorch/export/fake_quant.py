"""The fake-quant model: the deploy model's integers, computed by stock operators in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto

from amct_pytorch.export.deploy import WRITERS, rewritten, split_output
from amct_pytorch.export.integer_layer import IntegerLayer
from amct_pytorch.export.onnx_graph import OnnxGraph
from amct_pytorch.record.factors import LayerFactors

# Operators whose results have axes behind the one that counts channels.
CONVOLUTIONS = ("Conv", "ConvTranspose")


def build_fake_quant(
    float_model: onnx.ModelProto, factors: Mapping[str, LayerFactors]
) -> onnx.ModelProto:
    """The fake-quant model of a float model and its factors; runs in stock ONNX Runtime.

    A layer L becomes Mul(1 / scale_d) -> Round -> Add(offset) -> Clip -> Sub(offset) -> L with
    integer-valued float weights and bias -> Round -> Mul(scale_w * scale_d). The integers
    stand in ``L.quant.output0`` (input, before Sub) and ``L.round.output0`` (result). The mean
    that an AveragePool yields is no integer and is not rounded. They are
    the deploy model's own as long as no sum leaves float32's exact integers
    (`IntegerLayer.exact_in_float32`). A float16 layer has a Cast to float32 before the first
    Mul and one back to float16 behind the last.

    Args:
        float_model: as for `build_deploy`; not changed.
        factors: as for `build_deploy`.

    Returns:
        A model of opset 18 (higher only where an operator needs it) and IR version 8.

    Raises:
        RecordError: factors missing, out of range, or of layers the model does not have.
        ExportError: a layer cannot be deployed; the message names it.
    """
    return rewritten(float_model, factors, _add_quant, _write_layer, _add_dequant)


def _write_layer(graph: OnnxGraph, layer: IntegerLayer) -> None:
    WRITERS[layer.layer.node.op_type](graph, _in_float(layer))


def _in_float(layer: IntegerLayer) -> IntegerLayer:
    weight = None if layer.weight is None else layer.weight.astype(np.float32)
    bias = None if layer.bias is None else layer.bias.astype(np.float32)
    return replace(layer, weight=weight, bias=bias)


def _add_quant(graph: OnnxGraph, layer: IntegerLayer) -> str:
    name = f"{layer.layer.name}.quant"

    def constant(what: str, value: float) -> str:
        return graph.set_array(graph.fresh(f"{name}.{what}"), np.array(value, np.float32))

    offset = constant("offset", layer.offset)
    low = constant("qmin", layer.activation.qmin)
    high = constant("qmax", layer.activation.qmax)
    chain = (
        ("Mul", "mul", (constant("scale", float(layer.inverse_scale)),)),
        ("Round", "round", ()),
        ("Add", "add", (offset,)),
        ("Clip", "clip", (low, high)),
        ("Sub", "sub", (offset,)),
    )
    tensor = str(layer.layer.node.input[0])
    if layer.layer.float_type != TensorProto.FLOAT:
        half, tensor = tensor, graph.fresh(f"{name}.float32")
        graph.add("Cast", [half], [tensor], name=graph.fresh(f"{name}.cast"), to=TensorProto.FLOAT)
    for op_type, step, constants in chain:
        output = graph.fresh(f"{name}.output0" if step == "clip" else f"{name}.{step}.output0")
        graph.add(op_type, [tensor, *constants], [output], name=graph.fresh(f"{name}.{step}"))
        tensor = output
    return tensor


def _add_dequant(graph: OnnxGraph, layer: IntegerLayer) -> None:
    name = layer.layer.name
    raw, scaled = split_output(graph, layer, f"{name}.dequant.output0")
    rounded = raw
    if layer.weight is not None:
        # Without the Round, ONNX Runtime folds the Mul into the weights.
        rounded = graph.fresh(f"{name}.round.output0")
        graph.add("Round", [raw], [rounded], name=graph.fresh(f"{name}.round"))
    scale = layer.dequant_scale
    if scale.size > 1 and layer.weight is not None and layer.layer.node.op_type in CONVOLUTIONS:
        scale = scale.reshape(-1, *[1] * (layer.weight.ndim - 2))
    elif scale.size == 1:
        scale = scale.reshape(())
    param = graph.set_array(graph.fresh(f"{name}.dequant.scale"), scale)
    to = layer.layer.float_type
    product = scaled if to == TensorProto.FLOAT else graph.fresh(f"{name}.dequant.float32")
    graph.add("Mul", [rounded, param], [product], name=graph.fresh(f"{name}.dequant"))
    if product != scaled:
        graph.add("Cast", [product], [scaled], name=graph.fresh(f"{name}.dequant.cast"), to=to)
