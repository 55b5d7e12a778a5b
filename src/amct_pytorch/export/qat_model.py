"""A QDQ model with trained factors, taken apart: the float model, and the factors of its layers."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto

from amct_pytorch.algorithms.arq import floored_for_bias
from amct_pytorch.errors import ExportError
from amct_pytorch.export.layer_nodes import KN, LayerFinder, tag_layer
from amct_pytorch.export.onnx_graph import OnnxGraph, attribute
from amct_pytorch.export.opset import IR_VERSION, plain_model
from amct_pytorch.formats import IntFormat
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.record.factors import LayerFactors

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Where the exporter of torch writes which module a node is of.
SCOPES = "pkg.torch.onnx.name_scopes"
# Codes of this type stand for signed ones of so many bits, moved up by so much.
CODES = {"int8": (8, 0), "uint8": (8, 128), "int4": (4, 0), "uint4": (4, 8)}
# A range of four bits is told from another Clip by its ends.
END_TOLERANCE = 1e-4
# Largest |integer bias|, with room for the sum in int32.
LARGEST_BIAS = 2**30


@dataclass
class QatModel:
    """What `read_qat_model` found.

    Attributes:
        model: the float model, weights on their grid, layers tagged with their names.
        factors: of each quantized layer, in the order of the nodes.
        types: of each layer, quantized or not, by name: ``Conv2d``, say.
        parameters: number of each layer's weights.
        reasons: why layers stay float, by name.
        notes: what had to be changed, by name.
    """

    model: onnx.ModelProto
    factors: dict[str, LayerFactors] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Input:
    source: str
    scale: float
    offset: int
    bits: int


@dataclass(frozen=True)
class _Weight:
    codes: np.ndarray  # as the layer's node reads them
    scale: np.ndarray  # of the same shape


def read_qat_model(model: onnx.ModelProto) -> QatModel:
    """Takes a QDQ model apart.

    A layer is quantized whose input comes from QuantizeLinear and DequantizeLinear with one
    scale, and whose weight is constant and comes from a DequantizeLinear with one scale, or
    one for each output channel, be it directly or moved by Transpose and Reshape. Other layers
    stay float. Factors are taken as they are; weights become integers times scale.

    Args:
        model: not changed.

    Raises:
        ExportError: there is no such layer, or one whose factors have no meaning here.
    """
    plain, opset = plain_model(model)
    return _Reader(OnnxGraph(plain), _module_names(model)).read(opset)


def _module_names(model: onnx.ModelProto) -> dict[str, str]:
    """The module that a node is of, by the node's first output, where the file says so."""
    found = {}
    for node in model.graph.node:
        for entry in node.metadata_props:
            if entry.key != SCOPES or not node.output:
                continue
            try:
                scopes = ast.literal_eval(entry.value)
                found[node.output[0]] = str(scopes[-2])
            except (ValueError, SyntaxError, IndexError, TypeError):
                continue
    return found


class _Reader:
    def __init__(self, graph: OnnxGraph, modules: dict[str, str]) -> None:
        self._graph, self._modules = graph, modules
        self._makers = graph.producers()
        self._finder = LayerFinder(graph)

    def read(self, opset: int) -> QatModel:
        """See `read_qat_model`."""
        found = QatModel(onnx.ModelProto())
        tags: dict[str, str] = {}
        for node in self._graph.nodes:
            if node.op_type in LAYERS:
                self._read_layer(node, found, tags)
        if not found.factors:
            raise ExportError(
                "the model has no Conv, ConvTranspose, Gemm or MatMul whose input and weight "
                "come from DequantizeLinear; give the file that torch.onnx.export wrote of a "
                "model with quantization-aware operators (Conv2dQAT and the like)"
            )
        found.model = self._graph.model(opset=opset, ir_version=IR_VERSION)
        for node in found.model.graph.node:
            if node.output and node.output[0] in tags:
                tag_layer(node, tags[node.output[0]])
        return found

    def _read_layer(self, node: NodeProto, found: QatModel, tags: dict[str, str]) -> None:
        name = self._name(node, found)
        weight, data = self._weight(name, node.input[1]), self._input(name, node.input[0])
        constant = self._finder.constant(node.input[1])
        if weight is None and data is None and constant is None:
            return  # a product of two computed tensors is no layer
        shape = () if constant is None else constant.shape
        shape = shape if weight is None else weight.codes.shape
        found.types[name] = _type_of(node, len(shape))
        found.parameters[name] = int(np.prod(shape))
        if weight is None or data is None:
            missing = "its weight is not quantized" if weight is None else ""
            found.reasons[name] = missing or "its input is not quantized"
            return
        tags[node.output[0]] = name
        bits, notes = _weight_bits(node, weight)
        factors = LayerFactors(
            scale_w=self._channel_scales(name, node, weight),
            scale_d=data.scale,
            offset_d=data.offset,
            weight_bits=bits,
            activation_bits=data.bits,
        )
        operand = self._graph.fresh(f"{name}.weight")
        floats = weight.codes.astype(np.float32) * weight.scale
        node.input[0] = data.source
        node.input[1] = self._graph.set_array(operand, floats)
        if len(node.input) > 2 and node.input[2]:
            self._plain_bias(name, node, _layout(node).channels(weight.codes.shape))
        found.factors[name] = self._widened(name, node, factors, notes)
        if notes:
            found.notes[name] = notes

    def _name(self, node: NodeProto, found: QatModel) -> str:
        """The layer's module, or else the node's name; a number tells a module's calls apart."""
        stem = self._modules.get(node.output[0]) or node.name or str(node.output[0])
        name, number = stem, 1
        while name in found.types:
            name, number = f"{stem}_{number}", number + 1
        return name

    def _value(self, layer: str, what: str, name: str) -> np.ndarray:
        value = self._finder.constant(name)
        if value is None:
            raise ExportError(f"layer {layer!r}: {what} is not a constant of the ONNX model")
        return value

    def _maker(self, name: str, op_type: str) -> NodeProto | None:
        node = self._makers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def _factors(self, layer: str, node: NodeProto) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear."""
        scale = self._value(layer, "a scale", node.input[1])
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ExportError(f"layer {layer!r}: a scale is not finite and above 0")
        if len(node.input) > 2 and node.input[2]:
            return scale, self._value(layer, "a zero point", node.input[2])
        return scale, np.zeros(scale.shape, np.uint8)

    def _input(self, layer: str, name: str) -> _Input | None:
        dequantize = self._maker(name, "DequantizeLinear")
        quantize = dequantize and self._maker(dequantize.input[0], "QuantizeLinear")
        if dequantize is None or quantize is None:
            return None
        scale, zero = self._factors(layer, quantize)
        other_scale, other_zero = self._factors(layer, dequantize)
        if not (np.array_equal(scale, other_scale) and np.array_equal(zero, other_zero)):
            raise ExportError(
                f"layer {layer!r}: its input is quantized with other factors than dequantized"
            )
        if scale.size != 1 or zero.dtype.name not in CODES:
            raise ExportError(
                f"layer {layer!r}: its input has {scale.size} scales and {zero.dtype.name} codes; "
                f"allowed are one scale, and {', '.join(CODES)}"
            )
        bits, moved = CODES[zero.dtype.name]
        step, offset = float(scale.reshape(())), int(zero.reshape(())) - moved
        clip = self._maker(quantize.input[0], "Clip")
        if bits == 8 and clip is not None and self._is_low_range(clip, step, offset):
            return _Input(clip.input[0], step, offset, 4)
        return _Input(quantize.input[0], step, offset, bits)

    def _is_low_range(self, clip: NodeProto, scale: float, offset: int) -> bool:
        """Whether a Clip leaves what four bits hold."""
        found = [self._finder.constant(name) for name in clip.input[1:] if name]
        ends = [float(end.item()) for end in found if end is not None and end.size == 1]
        if len(ends) != 2:
            return False
        low = IntFormat(4)
        if not low.qmin <= offset <= low.qmax:
            return False
        wanted = [(end - offset) * scale for end in (low.qmin, low.qmax)]
        return bool(np.allclose(ends, wanted, rtol=0, atol=scale * END_TOLERANCE))

    def _weight(self, layer: str, name: str) -> _Weight | None:
        node = self._makers.get(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            return self._stored_weight(layer, node)
        if node.op_type not in ("Identity", "Reshape", "Transpose"):
            return None
        source = self._weight(layer, node.input[0])
        if source is None or node.op_type == "Identity":
            return source
        if node.op_type == "Transpose":
            axes = attribute(node, "perm")
            return _Weight(source.codes.transpose(axes), source.scale.transpose(axes))
        shape = [int(size) for size in self._value(layer, "a shape", node.input[1])]
        if not attribute(node, "allowzero", 0):
            shape = [s or source.codes.shape[i] for i, s in enumerate(shape)]
        return _Weight(source.codes.reshape(shape), source.scale.reshape(shape))

    def _stored_weight(self, layer: str, node: NodeProto) -> _Weight | None:
        scale, zero = self._factors(layer, node)
        codes = self._finder.constant(node.input[0])
        quantize = self._maker(node.input[0], "QuantizeLinear")
        floats = None if quantize is None else self._finder.constant(quantize.input[0])
        if codes is None and floats is None:
            return None
        values = codes if codes is not None else floats
        assert values is not None
        axis = int(attribute(node, "axis", 1))
        along = [1] * values.ndim
        if scale.size > 1:
            along[axis] = scale.size
        scale, zero = scale.reshape(along or ()), zero.astype(np.int64).reshape(along or ())
        if codes is None:
            limits = np.iinfo(np.int8 if zero.min() < 0 or not zero.any() else np.uint8)
            codes = np.clip(np.rint(values / scale) + zero, limits.min, limits.max)
        signed = codes.astype(np.int64) - zero
        if signed.min(initial=0) < -128 or signed.max(initial=0) > 127:
            raise ExportError(
                f"layer {layer!r}: its weight reaches from {signed.min()} to {signed.max()} steps; "
                "allowed are -128 to 127"
            )
        return _Weight(signed, np.broadcast_to(scale.astype(np.float32), signed.shape))

    def _channel_scales(self, layer: str, node: NodeProto, weight: _Weight) -> tuple[float, ...]:
        scales = _layout(node).rows(np.ascontiguousarray(weight.scale))
        if not (scales == scales[:, :1]).all():
            raise ExportError(
                f"layer {layer!r}: its weight has several scales within an output channel"
            )
        first = scales[:, 0]
        one = bool((first == first[0]).all())
        return (float(first[0]),) if one else tuple(first.tolist())

    def _plain_bias(self, layer: str, node: NodeProto, channels: int) -> None:
        """Makes a bias a constant that is dequantized, or one number in every channel.

        torch's exporter gives a convolution without bias one that is computed: zero, expanded
        to the channels of its weight.
        """
        number = self._expanded(node.input[2])
        if number is not None:
            bias = np.full(channels, number, np.float32)
            node.input[2] = self._graph.set_array(self._graph.fresh(f"{layer}.bias"), bias)
        dequantize = self._maker(node.input[2], "DequantizeLinear")
        if dequantize is None:
            return
        codes = self._finder.constant(dequantize.input[0])
        if codes is None:
            return
        scale, _ = self._factors(layer, dequantize)
        bias = (codes.astype(np.float64) * scale).astype(np.float32)
        node.input[2] = self._graph.set_array(self._graph.fresh(f"{layer}.bias"), bias)

    def _expanded(self, name: str) -> float | None:
        """The one constant number that an Expand makes a tensor of, or None."""
        node = self._maker(name, "Expand")
        if node is None:
            return None
        while node is not None and node.op_type in ("Cast", "CastLike", "Expand", "Identity"):
            name = node.input[0]
            node = self._makers.get(name)
        value = self._finder.constant(name)
        return None if value is None or value.size != 1 else float(value.item())

    def _widened(
        self, layer: str, node: NodeProto, factors: LayerFactors, notes: list[str]
    ) -> LayerFactors:
        """Weight scales under which the bias is an int32."""
        bias = None
        if len(node.input) > 2 and node.input[2]:
            bias = self._finder.constant(node.input[2])
            if bias is None:
                bias = self._graph.array(node.input[2])
        if bias is None or factors.scale_d is None:
            return factors
        known = torch.tensor(factors.scale_w)
        flat = torch.tensor(np.asarray(bias, np.float32).reshape(-1))
        scale = floored_for_bias(known, factors.scale_d, flat, LARGEST_BIAS)
        if torch.equal(scale, known):
            return factors
        notes.append("weight scales next to zero are made larger, for the bias to fit into int32")
        return replace(factors, scale_w=tuple(scale.tolist()))


def _layout(node: NodeProto) -> WeightLayout:
    if node.op_type == "Conv":
        return WeightLayout(0)
    if node.op_type == "ConvTranspose":
        return WeightLayout(1, int(attribute(node, "group", 1)))
    return WeightLayout(0) if attribute(node, "transB", 0) else KN


def _type_of(node: NodeProto, dimensions: int) -> str:
    if node.op_type in ("Gemm", "MatMul"):
        return "Linear"
    return f"{node.op_type}{dimensions - 2}d"


def _weight_bits(node: NodeProto, weight: _Weight) -> tuple[int, list[str]]:
    """Four bits where all integers have them and they can be packed: the same integers."""
    low = IntFormat(4)
    if weight.codes.min(initial=0) < low.qmin or weight.codes.max(initial=0) > low.qmax:
        return 8, []
    layout: Any = _layout(node)
    if weight.codes.shape[layout.in_axis] % 2 or attribute(node, "group", 1) > 1:
        return 8, ["its weights of 4 bits are stored in 8: groups, or an odd number of channels"]
    return 4, []
