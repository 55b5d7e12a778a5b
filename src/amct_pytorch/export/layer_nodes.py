"""Finding each layer's operator in the float ONNX model, by the name its nodes carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from amct_pytorch.errors import ExportError
from amct_pytorch.export.onnx_graph import OnnxGraph, attribute
from amct_pytorch.graph.weight_layout import WeightLayout

LAYER_KEY = "amct.layer"
# Weights [K, N] of a Gemm or MatMul.
KN = WeightLayout(1)


@dataclass(frozen=True)
class LayerNode:
    """One layer of the float model, in one form whatever the exporter made of it.

    Attributes:
        name: the layer's dotted module name.
        node: its Conv, ConvTranspose, Gemm, MatMul or AveragePool.
        last: the node that yields the layer's output: `node`, or the Add of a MatMul's bias.
        weight: float32 weights; Conv [N, C/groups, *kernel], ConvTranspose [C, N/groups,
            *kernel], Gemm and MatMul [K, N], with Gemm's alpha worked in; None for a pool.
        bias: float32 [N] with Gemm's beta worked in, or None.
        layout: which weights belong to which output channel.
        weight_name: the weight's initializer, or the name of the tensor it is computed into.
        bias_name: the same for the bias, or None.
        float_type: ONNX type of its input and output, FLOAT or FLOAT16.
    """

    name: str
    node: NodeProto
    last: NodeProto
    weight: np.ndarray | None
    bias: np.ndarray | None
    layout: WeightLayout
    weight_name: str
    bias_name: str | None
    float_type: int = TensorProto.FLOAT

    @property
    def output(self) -> str:
        """Name of the layer's output tensor."""
        return str(self.last.output[0])


def layer_of(node: NodeProto) -> str | None:
    """Name of the layer that a node belongs to, or None."""
    return next((p.value for p in node.metadata_props if p.key == LAYER_KEY), None)


def tag_layer(node: NodeProto, layer: str) -> None:
    """Write the name of its layer on a node, in place of an earlier one."""
    kept = [p for p in node.metadata_props if p.key != LAYER_KEY]
    del node.metadata_props[:]
    node.metadata_props.extend(kept)
    node.metadata_props.add(key=LAYER_KEY, value=layer)


def layer_names(model: ModelProto) -> list[str]:
    """Names of the layers in a float model, in the order of its nodes."""
    names = (layer_of(node) for node in model.graph.node if node.op_type in _READERS)
    return list(dict.fromkeys(name for name in names if name))


class LayerFinder:
    """Finds the layers of an `OnnxGraph` made from a float model.

    Args:
        graph: the graph, as it was loaded.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._makers = graph.producers()
        self._readers = graph.readers()
        self._tagged: dict[str, list[NodeProto]] = {}
        for node in graph.nodes:
            name = layer_of(node)
            if name is not None and node.op_type in _READERS:
                self._tagged.setdefault(name, []).append(node)

    @property
    def names(self) -> list[str]:
        """Names of the layers that the graph knows."""
        return list(self._tagged)

    def find(self, name: str) -> LayerNode:
        """The layer called `name`.

        Raises:
            ExportError: the graph does not have it, has it more than once, or its operands
                are not the constants that a layer has.
        """
        nodes = self._tagged.get(name, [])
        if len(nodes) != 1:
            found = f"{len(nodes)} nodes" if nodes else "no node"
            raise ExportError(
                f"layer {name!r}: the ONNX model has {found} for it; exactly one of "
                f"{', '.join(_READERS)} with metadata {LAYER_KEY} is needed"
            )
        layer = _READERS[nodes[0].op_type](self, name, nodes[0])
        return replace(layer, float_type=self._float_type(layer))

    def _float_type(self, layer: LayerNode) -> int:
        """The type of a layer's operands: that of its weights as they are stored, if any."""
        if layer.weight is not None:
            weight = self.constant(layer.node.input[1])
            half = weight is not None and weight.dtype == np.float16
            return int(TensorProto.FLOAT16 if half else TensorProto.FLOAT)
        for name in (layer.node.input[0], layer.output):
            known = self._graph.value_type(name)
            if known is not None and known.tensor_type.elem_type:
                return int(known.tensor_type.elem_type)
        return int(TensorProto.FLOAT)

    def constant(self, name: str) -> np.ndarray | None:
        """Value of a tensor that does not depend on the model's inputs, or None."""
        value = self._graph.array(name)
        node = self._makers.get(name)
        if value is not None or node is None:
            return value
        if node.op_type == "Constant":
            attr = node.attribute[0]
            if attr.name == "value":
                return numpy_helper.to_array(attr.t)
            return np.asarray(helper.get_attribute_value(attr))
        if node.op_type == "Identity":
            return self.constant(node.input[0])
        if node.op_type == "Transpose":
            source = self.constant(node.input[0])
            perm = attribute(node, "perm")
            return None if source is None else np.transpose(source, perm)
        return None

    def _weight(self, layer: str, node: NodeProto) -> np.ndarray:
        return self._float32(layer, "weight", self.constant(node.input[1]))

    def _float32(self, layer: str, what: str, value: np.ndarray | None) -> np.ndarray:
        if value is None:
            raise ExportError(f"layer {layer!r}: its {what} is not a constant of the ONNX model")
        if value.dtype not in (np.float32, np.float16):
            raise ExportError(
                f"layer {layer!r}: its {what} has type {value.dtype}; allowed are float32 and "
                "float16"
            )
        value = value.astype(np.float32, copy=False)
        if not np.isfinite(value).all():
            raise ExportError(f"layer {layer!r}: its {what} has NaN or infinite values")
        return value

    def _bias(self, layer: str, name: str, channels: int) -> np.ndarray:
        value = self._float32(layer, "bias", self.constant(name))
        if value.size not in (1, channels) or value.shape[-1:] not in ((), (value.size,)):
            raise ExportError(
                f"layer {layer!r}: its bias has shape {list(value.shape)}; one value for each "
                f"of {channels} output channels is needed"
            )
        return np.ascontiguousarray(np.broadcast_to(value.reshape(-1), (channels,)))

    def conv(self, name: str, node: NodeProto) -> LayerNode:
        """A Conv of any number of dimensions, groups and dilations."""
        return self._convolution(name, node, WeightLayout(0))

    def conv_transpose(self, name: str, node: NodeProto) -> LayerNode:
        """A ConvTranspose, likewise."""
        return self._convolution(name, node, WeightLayout(1, int(attribute(node, "group", 1))))

    def _convolution(self, name: str, node: NodeProto, layout: WeightLayout) -> LayerNode:
        weight = self._weight(name, node)
        _check_rank(name, node, weight, weight.ndim >= 3, "three or more")
        if weight.shape[0] % layout.stacked:
            raise ExportError(
                f"layer {name!r}: its weights of shape {list(weight.shape)} do not part into "
                f"{layout.stacked} groups"
            )
        bias_name = node.input[2] if len(node.input) > 2 and node.input[2] else None
        channels = layout.channels(weight.shape)
        bias = None if bias_name is None else self._bias(name, bias_name, channels)
        return LayerNode(name, node, node, weight, bias, layout, node.input[1], bias_name)

    def pool(self, name: str, node: NodeProto) -> LayerNode:
        """An AveragePool, which has no weights."""
        return LayerNode(name, node, node, None, None, WeightLayout(0), "", None)

    def gemm(self, name: str, node: NodeProto) -> LayerNode:
        """A Gemm with the weights as its second operand."""
        if attribute(node, "transA", 0):
            raise ExportError(f"layer {name!r}: a Gemm with transA cannot be quantized")
        weight = self._weight(name, node)
        _check_rank(name, node, weight, weight.ndim == 2, "two")
        if attribute(node, "transB", 0):
            weight = np.ascontiguousarray(weight.T)
        weight = weight * np.float32(attribute(node, "alpha", 1.0))
        bias_name = node.input[2] if len(node.input) > 2 and node.input[2] else None
        bias = None
        if bias_name is not None:
            beta = np.float32(attribute(node, "beta", 1.0))
            bias = self._bias(name, bias_name, weight.shape[1]) * beta
        return LayerNode(name, node, node, weight, bias, KN, node.input[1], bias_name)

    def matmul(self, name: str, node: NodeProto) -> LayerNode:
        """A MatMul with 2-D weights, and the Add of a 1-D constant behind it if there is one."""
        weight = self._weight(name, node)
        _check_rank(name, node, weight, weight.ndim == 2, "two")
        readers = self._readers.get(node.output[0], [])
        if len(readers) == 1 and node.output[0] not in self._graph.output_names:
            add = readers[0]
            others = [i for i in add.input if i != node.output[0]]
            if add.op_type == "Add" and len(others) == 1:
                value = self.constant(others[0])
                if value is not None and value.ndim == 1 and value.size == weight.shape[1]:
                    bias = self._bias(name, others[0], weight.shape[1])
                    return LayerNode(name, node, add, weight, bias, KN, node.input[1], others[0])
        return LayerNode(name, node, node, weight, None, KN, node.input[1], None)


def _check_rank(layer: str, node: NodeProto, weight: np.ndarray, fits: bool, allowed: str) -> None:
    if not fits:
        raise ExportError(
            f"layer {layer!r}: its {node.op_type} has weights of shape {list(weight.shape)}; "
            f"allowed are {allowed} dimensions"
        )


# How each operator that a layer may become is read. A new kind of layer is one more row.
_READERS: dict[str, Callable[[LayerFinder, str, NodeProto], LayerNode]] = {
    "Conv": LayerFinder.conv,
    "ConvTranspose": LayerFinder.conv_transpose,
    "Gemm": LayerFinder.gemm,
    "MatMul": LayerFinder.matmul,
    "AveragePool": LayerFinder.pool,
}
