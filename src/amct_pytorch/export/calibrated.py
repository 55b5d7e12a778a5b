"""Completing the modified ONNX when calibration ends: final biases and metadata."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from amct_pytorch.errors import ExportError
from amct_pytorch.export.layer_nodes import LayerFinder
from amct_pytorch.export.onnx_graph import OnnxGraph


def complete(
    model: onnx.ModelProto, biases: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Puts calibrated biases and metadata into a float model, in place.

    Args:
        model: the modified ONNX model as `quantize_model` wrote it.
        biases: bias by layer name, [out_channels].
        metadata: model-level metadata to set.

    Raises:
        ExportError: a layer is not in the model: the file is not the one that was written.
    """
    finder = LayerFinder(OnnxGraph(model))
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, bias in biases.items():
        if name not in finder.names:
            raise ExportError(f"the modified ONNX model has no layer {name!r}; it was replaced")
        bias_name = finder.find(name).bias_name
        if bias_name is None or bias_name not in initializers:
            raise ExportError(f"layer {name!r} has no bias tensor in the modified ONNX model")
        held = initializers[bias_name]
        dtype = helper.tensor_dtype_to_np_dtype(held.data_type)
        held.CopyFrom(numpy_helper.from_array(bias.astype(dtype), bias_name))
    kept = [entry for entry in model.metadata_props if entry.key not in metadata]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
