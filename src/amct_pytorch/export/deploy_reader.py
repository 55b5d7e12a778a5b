"""Reading a deploy model, from whatever tool: its quantizers and its integer layers."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto

from amct_pytorch.errors import ExportError
from amct_pytorch.export.integer_layer import unpack_param
from amct_pytorch.export.onnx_graph import DEFAULT_DOMAINS, OnnxGraph, attribute
from amct_pytorch.export.opset import OPSET, opset_of, raise_opset
from amct_pytorch.formats.integer import IntFormat

QUANT, DEQUANT = "AscendQuant", "AscendDequant"
FORMATS = MappingProxyType({"INT8": IntFormat(8), "INT4": IntFormat(4)})
FLOAT_TYPES = MappingProxyType({0: TensorProto.FLOAT, 1: TensorProto.FLOAT16})
# Operators that move integers about without computing with them.
MOVING = frozenset({"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
# Operators with integer weights, and the axis of the weights that counts output channels.
WEIGHTED = MappingProxyType({"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1})
POOLING = frozenset({"AveragePool", "GlobalAveragePool"})


@dataclass(frozen=True)
class Quantizer:
    """One AscendQuant: q = clip(round(x * inverse_scale) + offset)."""

    node: NodeProto
    inverse_scale: np.float32
    offset: int
    format: IntFormat

    @property
    def source(self) -> str:
        """The tensor it quantizes."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """The integers."""
        return str(self.node.output[0])


@dataclass(frozen=True)
class DeployLayer:
    """One layer between an AscendQuant and an AscendDequant.

    Attributes:
        name: the layer's name.
        node: Conv, ConvTranspose, Gemm, MatMul, or a pooling operator.
        last: the node that yields the integers: `node`, or the Add of a MatMul's bias.
        dequant: the AscendDequant.
        quantizer: of its input.
        weight: int8, unpacked; Conv [N, C/groups, ...], ConvTranspose [C, N/groups, ...],
            else [K, N]; None for pooling.
        bias: int32 [N], or None.
        scale: float32 [1] or [N], what the integers are multiplied with.
        float_type: ONNX type of the result.
    """

    name: str
    node: NodeProto
    last: NodeProto
    dequant: NodeProto
    quantizer: Quantizer
    weight: np.ndarray | None
    bias: np.ndarray | None
    scale: np.ndarray
    float_type: int

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        return int(attribute(self.node, "group", 1))

    @property
    def channels(self) -> int:
        """Output channels (for pooling: as many as there are scales)."""
        if self.weight is None:
            return int(self.scale.size)
        n = int(self.weight.shape[WEIGHTED[self.node.op_type]])
        return n * self.groups if self.node.op_type == "ConvTranspose" else n

    @property
    def raw(self) -> str:
        """The tensor of integers that AscendDequant reads."""
        return str(self.dequant.input[0])

    @property
    def output(self) -> str:
        """The tensor of floats that AscendDequant makes."""
        return str(self.dequant.output[0])


class DeployModel:
    """A deploy model taken apart.

    Args:
        model: the ONNX model; not changed.

    Attributes:
        graph: its graph, free to be edited.
        opset: its version of the default operator set.
        quantizers: AscendQuant by name of the tensor it makes.
        layers: in the order of the AscendDequant nodes.

    Raises:
        ExportError: it has operators that neither ONNX nor this contract knows, or they are
            put together in a way that has no meaning.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = OnnxGraph(model)
        self.opset = opset_of(model)
        self._check_operators()
        if self.opset < OPSET:
            model = raise_opset(model, (QUANT, DEQUANT))
            self.graph, self.opset = OnnxGraph(model), OPSET
        self._makers = self.graph.producers()
        self.quantizers = {
            str(node.output[0]): self._quantizer(node)
            for node in self.graph.nodes
            if node.op_type == QUANT
        }
        self.layers = [self._layer(node) for node in self.graph.nodes if node.op_type == DEQUANT]
        claimed = {id(layer.node) for layer in self.layers}
        for node in self.graph.nodes:
            reads = [name for name in node.input if name in self.quantizers]
            if reads and id(node) not in claimed and node.op_type not in MOVING:
                raise ExportError(
                    f"node {node.name!r} ({node.op_type}) reads the integers {reads[0]!r} but "
                    "no AscendDequant follows it"
                )

    def _check_operators(self) -> None:
        for node in self.graph.nodes:
            if node.domain not in DEFAULT_DOMAINS:
                raise ExportError(
                    f"node {node.name!r} has operator {node.op_type} of domain {node.domain!r}; "
                    "a deploy model has only operators of the default domain"
                )
            if node.op_type in (QUANT, DEQUANT):
                continue
            if not onnx.defs.has(node.op_type, self.opset):
                raise ExportError(
                    f"node {node.name!r} has operator {node.op_type!r}, which opset "
                    f"{self.opset} does not have"
                )

    def _quantizer(self, node: NodeProto) -> Quantizer:
        scale, offset = attribute(node, "scale"), attribute(node, "offset", 0.0)
        dst = attribute(node, "dst_type", "INT8")
        if scale is None or not np.isfinite(scale) or scale <= 0:
            raise ExportError(f"AscendQuant {node.name!r}: scale is {scale}; it must be above 0")
        if dst not in FORMATS:
            raise ExportError(
                f"AscendQuant {node.name!r}: dst_type is {dst!r}; allowed are " + ", ".join(FORMATS)
            )
        fmt = FORMATS[dst]
        if offset != int(offset) or not fmt.qmin <= offset <= fmt.qmax:
            raise ExportError(
                f"AscendQuant {node.name!r}: offset is {offset}; allowed are the integers "
                f"{fmt.qmin} to {fmt.qmax}"
            )
        return Quantizer(node, np.float32(scale), int(offset), fmt)

    def quantizer_of(self, name: str) -> Quantizer | None:
        """The AscendQuant whose integers a tensor holds, moved about or not."""
        while name not in self.quantizers:
            node = self._makers.get(name)
            if node is None or node.op_type not in MOVING:
                return None
            name = node.input[0]
        return self.quantizers[name]

    def _layer(self, dequant: NodeProto) -> DeployLayer:
        name = dequant.name.removesuffix(".dequant")
        param = self.graph.array(dequant.input[1]) if len(dequant.input) > 1 else None
        if param is None or param.dtype != np.uint64:
            raise ExportError(f"AscendDequant {dequant.name!r} has no UINT64 parameter")
        scale, offset_w = unpack_param(param.reshape(-1))
        if offset_w.any() or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ExportError(
                f"AscendDequant {dequant.name!r}: its parameter holds scales that are not "
                "above 0, or weight offsets other than 0"
            )
        dtype = attribute(dequant, "dtype", 0)
        if dtype not in FLOAT_TYPES:
            raise ExportError(
                f"AscendDequant {dequant.name!r}: dtype is {dtype}; allowed are 0 and 1"
            )
        last = self._maker(dequant, dequant.input[0])
        node, bias_name = last, None
        if last.op_type == "Add":
            constants = [i for i in last.input if i in self.graph.initializers]
            others = [i for i in last.input if i not in self.graph.initializers]
            if len(constants) != 1:
                raise ExportError(f"layer {name!r}: node {last.name!r} adds no constant")
            bias_name, node = constants[0], self._maker(last, others[0])
        quantizer = self.quantizer_of(node.input[0])
        if quantizer is None:
            raise ExportError(
                f"layer {name!r}: the input of {node.op_type} {node.name!r} comes from no "
                "AscendQuant"
            )
        weight = bias = None
        factors = [attribute(node, key, 1.0) for key in ("alpha", "beta")]
        if attribute(node, "transA", 0) or factors != [1.0, 1.0]:
            raise ExportError(f"layer {name!r}: Gemm {node.name!r} has transA, alpha or beta")
        if node.op_type in WEIGHTED:
            weight = self._constant(name, node.input[1], np.dtype(np.int8), "weight")
            matrix = node.op_type in ("Gemm", "MatMul")
            if weight.ndim != 2 if matrix else weight.ndim < 3:
                raise ExportError(
                    f"layer {name!r}: its weight has shape {list(weight.shape)}; {node.op_type} "
                    f"has {'two' if matrix else 'three or more'} dimensions"
                )
            if attribute(node, "transB", 0):
                weight = np.ascontiguousarray(weight.T)
            weight = self._unpacked(node, weight, quantizer)
            if bias_name is None and len(node.input) > 2 and node.input[2]:
                bias_name = node.input[2]
        elif node.op_type not in POOLING:
            raise ExportError(
                f"layer {name!r}: {node.op_type} {node.name!r} between AscendQuant and "
                "AscendDequant has no integer arithmetic; allowed are "
                + ", ".join([*WEIGHTED, *sorted(POOLING)])
            )
        if bias_name is not None:
            bias = self._constant(name, bias_name, np.dtype(np.int32), "bias").reshape(-1)
        layer = DeployLayer(
            name, node, last, dequant, quantizer, weight, bias, scale, FLOAT_TYPES[dtype]
        )
        self._check_sizes(layer)
        return layer

    def _unpacked(self, node: NodeProto, weight: np.ndarray, quantizer: Quantizer) -> np.ndarray:
        """`weight` with every integer in a byte of its own.

        No attribute says that a byte holds two 4-bit weights; then the weight has half as
        many input channels as the layer's input.
        """
        matrix = node.op_type in ("Gemm", "MatMul")
        axis = 1 - WEIGHTED[node.op_type]
        moved = node.input[0] != quantizer.output
        kind = self.graph.value_type(str(node.input[0]) if moved else quantizer.source)
        sizes = kind.tensor_type.shape.dim if kind is not None else ()
        if not sizes or attribute(node, "group", 1) != 1:
            return weight
        channels = sizes[-1 if matrix else 1].dim_value
        if channels != 2 * weight.shape[axis]:
            return weight
        fmt = IntFormat(4)
        codes = fmt.unpack(torch.from_numpy(weight.view(np.uint8).copy()), channels, axis)
        integers: np.ndarray = codes.numpy()
        return integers

    def _check_sizes(self, layer: DeployLayer) -> None:
        for what, value in (("scales", layer.scale), ("biases", layer.bias)):
            if value is not None and value.size not in (1, layer.channels):
                raise ExportError(
                    f"layer {layer.name!r}: it has {value.size} {what} for {layer.channels} "
                    "output channels"
                )

    def _maker(self, reader: NodeProto, name: str) -> NodeProto:
        node = self._makers.get(name)
        if node is None:
            raise ExportError(f"node {reader.name!r} reads {name!r}, which no node makes")
        return node

    def _constant(self, layer: str, name: str, dtype: np.dtype, what: str) -> np.ndarray:
        value = self.graph.array(name)
        if value is None or value.dtype != dtype:
            found = "no constant" if value is None else f"of type {value.dtype}"
            raise ExportError(f"layer {layer!r}: its {what} {name!r} is {found}; needed is {dtype}")
        return value
