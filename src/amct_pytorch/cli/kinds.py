"""Which of the toolkit's files an ONNX model is."""

from __future__ import annotations

import onnx

from amct_pytorch.export.layer_nodes import LAYER_KEY
from amct_pytorch.flows.preparation import FINGERPRINT_KEY


def onnx_kind(model: onnx.ModelProto) -> str:
    """``deploy``, ``QDQ``, ``modified``, ``fake-quant`` or ``float``."""
    operators = {node.op_type for node in model.graph.node}
    if operators & {"AscendQuant", "AscendDequant"}:
        return "deploy"
    if operators & {"QuantizeLinear", "DequantizeLinear"}:
        return "QDQ"
    tagged = any(
        entry.key == LAYER_KEY for node in model.graph.node for entry in node.metadata_props
    )
    if tagged or any(entry.key == FINGERPRINT_KEY for entry in model.metadata_props):
        return "modified"
    names = {node.name for node in model.graph.node if node.op_type == "Round"}
    if any(name.endswith(".quant.round") for name in names):
        return "fake-quant"
    return "float"
