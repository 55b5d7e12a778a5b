"""A layer and its factors -> the integers that are deployed. The only place that does this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from amct_pytorch.errors import ExportError, RecordError, did_you_mean
from amct_pytorch.export.layer_nodes import LayerFinder, LayerNode
from amct_pytorch.export.onnx_graph import OnnxGraph, attribute
from amct_pytorch.formats.integer import IntFormat
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.record.factors import LayerFactors

INT32 = np.iinfo(np.int32)
# float32 holds every integer up to here, so sums of integers below it are exact.
EXACT_FLOAT32 = 1 << 24


@dataclass(frozen=True)
class IntegerLayer:
    """What the deploy and the fake-quant model both compute with.

    Attributes:
        layer: where the layer is in the float model.
        weight: int8, in the shape of `layer.weight`; None for a pool.
        bias: int32 [N], or None.
        inverse_scale: float32 1 / scale_d, the factor of AscendQuant.
        offset: zero point of the input.
        dequant_scale: float32 scale_w * scale_d, [1] or [N].
        activation: the format of the input.
        weight_format: the format of the weights; four bits are packed in the deploy model.
    """

    layer: LayerNode
    weight: np.ndarray | None
    bias: np.ndarray | None
    inverse_scale: np.float32
    offset: int
    dequant_scale: np.ndarray
    activation: IntFormat
    weight_format: IntFormat

    @property
    def quantizer(self) -> tuple[bytes, int, str]:
        """What two quantizers of one tensor must share to be one."""
        return self.inverse_scale.tobytes(), self.offset, self.activation.name

    def largest_sum(self) -> int:
        """Largest |sum| any input can give in any order of adding: at most this."""
        if self.weight is None:
            # A window of as many values as this would take a pool beyond 2^24.
            kernel: list[int] = list(attribute(self.layer.node, "kernel_shape", ()))
            return math.prod(kernel) * self.activation.reach(self.offset)
        return largest_sum(
            self.weight, self.bias, self.layer.layout, self.offset, self.activation.bits
        )

    def exact_in_float32(self) -> bool:
        """Whether float32 arithmetic yields this layer's integers exactly for every input."""
        return self.largest_sum() <= EXACT_FLOAT32


def largest_sum(
    weight: np.ndarray, bias: np.ndarray | None, layout: WeightLayout, offset: int, bits: int = 8
) -> int:
    """max over channels of sum|w| * max|q - offset| + |bias|, as an exact integer."""
    sums = np.abs(layout.rows(weight).astype(np.int64)).sum(axis=1)
    sums = sums * IntFormat(bits).reach(offset)
    if bias is not None:
        sums = sums + np.abs(bias.astype(np.int64))
    return int(sums.max(initial=0))


def pack_param(dequant_scale: np.ndarray, offset_w: int = 0) -> np.ndarray:
    """AscendDequant's parameter: UINT64, bits 0-31 the float32, bits 32-39 offset_w.

    Args:
        dequant_scale: float32 [N].
        offset_w: one signed byte.
    """
    bits = np.ascontiguousarray(dequant_scale, np.float32).view(np.uint32).astype(np.uint64)
    param: np.ndarray = bits | np.uint64((offset_w & 0xFF) << 32)
    return param


def unpack_param(param: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The float32 scales and the int8 weight offsets inside AscendDequant's parameter."""
    param = np.ascontiguousarray(param, np.uint64)
    scale = (param & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    offset = ((param >> np.uint64(32)) & np.uint64(0xFF)).astype(np.uint8).view(np.int8)
    return scale, offset


def integer_layer(layer: LayerNode, factors: LayerFactors) -> IntegerLayer:
    """The integers of one layer.

    weight = clip(round(w / scale_w)), bias = round(b / (scale_w * scale_d)), both half to
    even, the product in float32 as it is stored, the quotient of the bias in float64.

    Args:
        layer: the layer in the float model.
        factors: its complete factors.

    Raises:
        RecordError: the number of scales does not fit the layer.
        ExportError: a bias does not fit into int32; something is not supported yet.
    """
    _check_supported(layer, factors)
    assert factors.scale_d is not None
    channels = 1 if layer.weight is None else layer.layout.channels(layer.weight.shape)
    if len(factors.scale_w) not in (1, channels):
        raise RecordError(
            f"layer {layer.name!r}: the record has {len(factors.scale_w)} values of scale_w; "
            f"1 or {channels} are needed, one for each output channel"
        )
    scale_d = np.float32(factors.scale_d)
    product = factors.bias_scale()
    with np.errstate(over="ignore", under="ignore"):
        inverse = np.float32(1) / scale_d
    if not (np.isfinite(product).all() and (product > 0).all() and np.isfinite(inverse)):
        raise ExportError(
            f"layer {layer.name!r}: scale_w * scale_d or 1 / scale_d leaves the range of float32 "
            f"(scale_d is {factors.scale_d:g})"
        )
    return IntegerLayer(
        layer,
        None if layer.weight is None else _integer_weight(layer, factors),
        None if layer.bias is None else _integer_bias(layer, product),
        inverse,
        factors.offset_d,
        factors.dequant_scale(),
        IntFormat(factors.activation_bits),
        IntFormat(factors.weight_bits),
    )


def _integer_weight(layer: LayerNode, factors: LayerFactors) -> np.ndarray:
    assert layer.weight is not None
    scale = np.asarray(factors.scale_w, np.float32)
    quantized = IntFormat(factors.weight_bits).quantize(
        torch.tensor(layer.weight),
        torch.tensor(layer.layout.along_channels(scale, layer.weight.shape)),
    )
    integers: np.ndarray = quantized.to(torch.int8).numpy()
    return integers


def _integer_bias(layer: LayerNode, scale: np.ndarray) -> np.ndarray:
    assert layer.bias is not None
    # IntFormat ends at 16 bits; this is its rounding (half to even) at 32, unclipped.
    value = np.rint(layer.bias.astype(np.float64) / scale.astype(np.float64))
    beyond = np.flatnonzero((value < INT32.min) | (value > INT32.max))
    if beyond.size:
        i = int(beyond[0])
        raise ExportError(
            f"layer {layer.name!r}: the integer bias of output channel {i} is {value[i]:g}, "
            f"beyond int32; its float bias is {layer.bias[i]:g} and scale_w * scale_d is "
            f"{scale[i % scale.size]:g}, too small for it"
        )
    return value.astype(np.int32)


def _check_supported(layer: LayerNode, factors: LayerFactors) -> None:
    if factors.weight_bits == 4 and layer.weight is not None:
        inputs = layer.weight.shape[layer.layout.in_axis]
        if inputs % 2 or attribute(layer.node, "group", 1) > 1:
            raise ExportError(
                f"layer {layer.name!r}: weights of 4 bits cannot be packed with an odd number of "
                "input channels or with groups; give it wts_type INT8"
            )


def check_factors(factors: Mapping[str, LayerFactors], known: Iterable[str]) -> None:
    """Refuse factors that cannot be deployed, naming every layer concerned.

    Raises:
        RecordError: a layer is not in the model, lacks factors, or has ones out of range.
    """
    known = list(known)
    unknown = [name for name in factors if name not in known]
    if unknown:
        hints = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
        raise RecordError(f"the record has layers that the ONNX model does not have: {hints}")
    missing = [name for name, layer in factors.items() if not layer.complete]
    if missing:
        raise RecordError(
            "factors are missing for " + ", ".join(map(repr, missing)) + ": calibrate with "
            "batch_num batches first"
        )
    for name, layer in factors.items():
        for what, values in (("scale_w", layer.scale_w), ("scale_d", (layer.scale_d,))):
            wrong = [v for v in values if v is None or not (math.isfinite(v) and v > 0)]
            if wrong:
                raise RecordError(
                    f"layer {name!r}: {what} is {wrong[0]}; scales are finite and above 0"
                )
        fmt = IntFormat(layer.activation_bits)
        if not fmt.qmin <= layer.offset_d <= fmt.qmax:
            raise RecordError(
                f"layer {name!r}: offset_d is {layer.offset_d}; allowed are {fmt.qmin} to "
                f"{fmt.qmax}"
            )


def integer_layers(
    finder: LayerFinder, factors: Mapping[str, LayerFactors]
) -> Iterator[IntegerLayer]:
    """Every layer that has factors, in the order of the model, one at a time.

    Args:
        finder: knows the layers of the float model.
        factors: of the layers to quantize; the model's other layers stay float.

    Raises:
        RecordError: factors missing, out of range, or of layers the model does not have.
        ExportError: a layer cannot be turned into integers.
    """
    check_factors(factors, finder.names)
    for name in finder.names:
        if name in factors:
            yield integer_layer(finder.find(name), factors[name])


def inexact_in_float32(
    model: onnx.ModelProto, factors: Mapping[str, LayerFactors]
) -> frozenset[str]:
    """The layers whose integer sums can leave the range in which float32 is exact.

    Args:
        model: the float model.
        factors: of the layers to quantize.

    Raises:
        RecordError, ExportError: see `integer_layers`.
    """
    layers = integer_layers(LayerFinder(OnnxGraph(model)), factors)
    return frozenset(layer.layer.name for layer in layers if not layer.exact_in_float32())
