"""Completing the modified ONNX when calibration ends: final biases and metadata."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from amct_pytorch.errors import ExportError
from amct_pytorch.export.layer_nodes import LayerFinder
from amct_pytorch.export.onnx_graph import OnnxGraph, attribute


def complete(
    model: onnx.ModelProto,
    biases: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Puts calibrated biases and weights and metadata into a float model, in place.

    Args:
        model: the modified ONNX model as `quantize_model` wrote it.
        biases: bias by layer name, [out_channels].
        weights: weight by layer name, in torch's layout, for those that are to be replaced.
        metadata: model-level metadata to set.

    Raises:
        ExportError: a layer is not in the model: the file is not the one that was written.
    """
    graph = OnnxGraph(model)
    finder = LayerFinder(graph)
    held = _Held(graph, {tensor.name: tensor for tensor in model.graph.initializer})
    for name, bias in biases.items():
        if name not in finder.names:
            raise ExportError(f"the modified ONNX model has no layer {name!r}; it was replaced")
        layer = finder.find(name)
        held.put(name, "bias", layer.bias_name, bias)
        weight = weights.get(name)
        if weight is not None:
            if layer.node.op_type in ("Gemm", "MatMul") and not attribute(layer.node, "transB", 0):
                weight = weight.T
            held.put(name, "weight", layer.weight_name, weight)
    kept = [entry for entry in model.metadata_props if entry.key not in metadata]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)


class _Held:
    """The tensors that a model holds.

    Args:
        graph: the model's.
        initializers: by name.
    """

    def __init__(self, graph: OnnxGraph, initializers: Mapping[str, onnx.TensorProto]) -> None:
        self._makers = graph.producers()
        self._initializers = initializers

    def put(self, layer: str, what: str, name: str | None, value: np.ndarray) -> None:
        """Stores what a layer's operand is to be, where the graph takes it from."""
        while name in self._makers and self._makers[name].op_type in ("Identity", "Transpose"):
            node = self._makers[name]
            if node.op_type == "Transpose":
                perm = attribute(node, "perm", list(range(value.ndim))[::-1])
                value = np.transpose(value, np.argsort(perm))
            name = node.input[0]
        if name is None or name not in self._initializers:
            raise ExportError(f"layer {layer!r} has no {what} tensor in the modified ONNX model")
        held = self._initializers[name]
        dtype = helper.tensor_dtype_to_np_dtype(held.data_type)
        stored = np.ascontiguousarray(value.astype(dtype, copy=False))
        held.CopyFrom(numpy_helper.from_array(stored, name))
