"""The portable model: a deploy model as standard QuantizeLinear/DequantizeLinear ONNX."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from amct_pytorch.errors import ExportError
from amct_pytorch.export.deploy_reader import WEIGHTED, DeployLayer, DeployModel, Quantizer
from amct_pytorch.export.onnx_file import load_onnx, save_onnx
from amct_pytorch.export.opset import IR_VERSION
from amct_pytorch.export.qdq_plan import WHOLE, Closing, Code, QdqPlan, read_extra_ranges
from amct_pytorch.export.runtime import fast_kernels_clip
from amct_pytorch.export.widen import widen
from amct_pytorch.files import PathLike, check_distinct, check_writable
from amct_pytorch.graph.weight_layout import WeightLayout

log = logging.getLogger("amct_pytorch")

# A pool's scale is that of its input, but for the rounding of a float32 division.
POOL_SCALE_TOLERANCE = 1e-6


def deploy_to_qdq(deploy_model_file: PathLike, save_file: PathLike) -> None:
    """Write a deploy model as standard ONNX that common runtimes run with fused int8 kernels.

    Every layer becomes DequantizeLinear(u8 input), DequantizeLinear(int8 weights, per channel),
    DequantizeLinear(int32 bias) -> operator -> QuantizeLinear, with operators of ONNX opset 18
    only: ONNX Runtime, TensorRT and OpenVINO read it. Inputs are the deploy model's integers
    plus 128. A Relu or Clip is dropped where the quantizer behind it does its work, else it
    becomes a Clip of the integers, which is the same.

    A convolution that feeds something in float (a residual Add) gets a quantizer of its own:
    its range comes from the deploy model's metadata `amct.extra_ranges` (written by this
    toolkit's calibration), else from both bounds of the activation behind it. Where neither
    says, the convolution stays in float, which is right and slower; the log names it. The
    model's outputs are never quantized. A model with float16 layers computes in float32 inside;
    its inputs and outputs keep their types.

    Runtimes multiply and round where they fuse, so a layer's integers differ from the deploy
    model's by at most one step for the same input; use `DeploySession` for the exact ones.

    On x86 processors without VNNI (or AMX), ONNX Runtime by default adds pairs of u8 x int8
    products in 16 bits and saturates, which can ruin the result (EfficientNet-Lite0: 9 dB in
    place of 25). There, and only there, set this on the session; it costs about a third of the
    speed, and more than half on processors that do not need it::

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")

    A warning is logged when the machine that runs this call is such a one.

    Args:
        deploy_model_file: a deploy model, from this toolkit or another with the same operators.
        save_file: path of the ONNX file to write; folders are made, an old file is replaced.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is no path of a file.
        FileMissingError: `deploy_model_file` does not exist.
        FileAccessError: a file cannot be read or written.
        ExportError: `deploy_model_file` is no ONNX model, has operators that are not known, or
            its integer layers are put together in a way that has no meaning.
    """
    check_writable(save_file, "save_file")
    check_distinct(deploy_model_file=deploy_model_file, save_file=save_file)
    model, islands = qdq_model(load_onnx(deploy_model_file, "deploy_model_file"))
    save_onnx(model, save_file, what="save_file")
    if islands:
        log.warning(
            "%s: no output range is known for %d convolutions, so they run in float: %s",
            save_file,
            len(islands),
            ", ".join(islands),
        )
    if fast_kernels_clip():
        log.warning(
            "ONNX Runtime's u8 x int8 kernels saturate on this machine; run %s here with the "
            'session option "session.x64quantprecision" = "1"',
            save_file,
        )


def qdq_model(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The QDQ model of a deploy model, and the names of the convolutions left in float.

    Args:
        model: the deploy model; not changed.
    """
    deploy = DeployModel(model)
    if not deploy.layers:
        raise ExportError(
            "no layer of the model is quantized (there is no AscendQuant with its AscendDequant): "
            "it is a float model, as the deploy model of sparsity alone is, and runs as it is; "
            "or give the file that ends in deploy_model.onnx"
        )
    if any(layer.float_type == TensorProto.FLOAT16 for layer in deploy.layers):
        # QuantizeLinear of opset 18 has no float16, and casts would keep runtimes from fusing.
        wide = ir.from_proto(model)
        widen(wide, {ir.DataType.FLOAT16}, borders=True)
        deploy = DeployModel(ir.to_proto(wide))
    writer = _QdqWriter(deploy)
    return writer.write(read_extra_ranges(model))


class _QdqWriter:
    """Writes float operators and Q/DQ pairs in place of a deploy model's operators."""

    def __init__(self, deploy: DeployModel) -> None:
        self._deploy = deploy
        self._graph = deploy.graph

    def write(self, extra: Mapping[str, tuple[float, float]]) -> tuple[onnx.ModelProto, list[str]]:
        """Rewrite the graph; see `qdq_model`."""
        for layer in self._deploy.layers:
            self._write_layer(layer)
        plan = QdqPlan(self._deploy, extra)
        open_quantizers = list(self._deploy.quantizers.values())
        for closing in plan.closings:
            takers = [q for q in open_quantizers if q.source == closing.last]
            open_quantizers = [q for q in open_quantizers if q.source != closing.last]
            self._write_closing(closing, takers)
        for quantizer in open_quantizers:
            code = Code.of(quantizer)
            self._write_pair(quantizer.source, code, WHOLE, self._take([quantizer]))
        model = self._graph.model(opset=self._deploy.opset, ir_version=IR_VERSION)
        # Types and shapes of what is in between are the runtimes' to find.
        del model.graph.value_info[:]
        return model, plan.islands

    def _constant(self, name: str, value: Any, dtype: Any) -> str:
        return self._graph.set_array(self._graph.fresh(name), np.asarray(value, dtype))

    def _take(self, quantizers: list[Quantizer]) -> tuple[str, str]:
        """Remove AscendQuant nodes; their readers read one new tensor, to be made.

        Returns:
            Names for the integers and for that tensor.
        """
        integers = quantizers[0].output
        value = self._graph.fresh(f"{integers}.dequantized")
        self._graph.remove([quantizer.node for quantizer in quantizers])
        for quantizer in quantizers:
            self._graph.replace_reads(quantizer.output, value)
        return integers, value

    def _write_closing(self, closing: Closing, takers: list[Quantizer]) -> None:
        assert closing.code is not None
        if takers:
            names = self._take(takers)
        else:
            integers = self._graph.fresh(f"{closing.tensor}.quantized")
            names = integers, self._graph.fresh(f"{integers}.dequantized")
        self._graph.remove(closing.activations)
        self._graph.replace_reads(closing.last, names[1])
        self._write_pair(closing.tensor, closing.code, closing.limits, names)

    def _write_pair(
        self, tensor: str, code: Code, limits: tuple[int, int], names: tuple[str, str]
    ) -> None:
        """QuantizeLinear, a Clip of the integers where there are limits, DequantizeLinear."""
        integers, value = names
        scale = self._constant(f"{integers}.scale", code.scale, np.float32)
        zero = self._constant(f"{integers}.zero", code.zero, np.uint8)
        quantized = integers if limits == WHOLE else self._graph.fresh(f"{integers}.unlimited")
        stem = integers.removesuffix(".output0")
        self._graph.add("QuantizeLinear", [tensor, scale, zero], [quantized], name=stem)
        if limits != WHOLE:
            low = self._constant(f"{integers}.low", limits[0], np.uint8)
            high = self._constant(f"{integers}.high", limits[1], np.uint8)
            self._graph.add("Clip", [quantized, low, high], [integers], name=f"{stem}.clip")
        self._graph.add(
            "DequantizeLinear", [integers, scale, zero], [value], name=f"{stem}.dequantize"
        )

    def _write_layer(self, layer: DeployLayer) -> None:
        """The layer's operator on floats, without its AscendDequant; weights dequantized."""
        graph, node = self._graph, layer.node
        graph.remove([node, layer.last, layer.dequant])
        input_scale = np.float32(Code.of(layer.quantizer).scale)
        scale_w = layer.scale / input_scale
        source, stem = str(node.input[0]), layer.name
        if layer.weight is None:
            self._write_pool(layer, source, scale_w)
            return
        inputs = [source, self._weight(layer, scale_w)]
        attributes = [a for a in node.attribute if a.name != "transB"]
        if layer.bias is None:
            graph.add(node.op_type, inputs, [layer.output], name=stem).attribute.extend(attributes)
            return
        bias = np.broadcast_to(layer.bias, (layer.channels,))
        if node.op_type == "MatMul":
            product = graph.fresh(f"{stem}.product")
            floats = bias * layer.scale.astype(np.float64)
            name = self._constant(f"{stem}.bias", floats, np.float32)
            graph.add("MatMul", inputs, [product], name=stem)
            graph.add("Add", [product, name], [layer.output], name=f"{stem}.add")
            return
        inputs.append(self._dequantized(bias, scale_w * input_scale, 0, f"{stem}.bias"))
        graph.add(node.op_type, inputs, [layer.output], name=stem).attribute.extend(attributes)

    def _write_pool(self, layer: DeployLayer, source: str, scale: np.ndarray) -> None:
        """The mean of floats, and a Mul where the pool's scale is not that of its input.

        ONNX Runtime fuses a pool that stands alone between its Q/DQ pairs. Its fused kernel
        divides by the whole window where ceil_mode lets that overhang the input (1.32:
        16 dB); there a Mul by the next number to 1 keeps it from fusing.
        """
        graph, stem = self._graph, layer.name
        attributes = layer.node.attribute
        alone = bool(np.all(np.abs(scale - 1) < POOL_SCALE_TOLERANCE))
        if alone and any(a.name == "ceil_mode" and a.i for a in attributes):
            alone, scale = False, np.nextafter(np.float32(1), np.float32(2)).reshape(1)
        pooled = layer.output if alone else graph.fresh(f"{stem}.pooled")
        graph.add(layer.node.op_type, [source], [pooled], name=stem).attribute.extend(attributes)
        if not alone:
            factor = self._constant(f"{stem}.scale", self._shaped(scale), np.float32)
            graph.add("Mul", [pooled, factor], [layer.output], name=f"{stem}.mul")

    def _weight(self, layer: DeployLayer, scale: np.ndarray) -> str:
        """The layer's weights, dequantized."""
        assert layer.weight is not None
        name, axis = f"{layer.name}.weight", WEIGHTED[layer.node.op_type]
        if layer.node.op_type == "ConvTranspose" and layer.groups > 1 and scale.size > 1:
            # One axis counts the channels of one group only, so no DequantizeLinear has a
            # scale for each channel.
            layout = WeightLayout(axis, layer.groups)
            floats = layer.weight * layout.along_channels(scale, layer.weight.shape)
            return self._constant(name, floats, np.float32)
        return self._dequantized(layer.weight, scale, axis, name)

    def _shaped(self, scale: np.ndarray) -> np.ndarray:
        return scale.reshape(()) if scale.size == 1 else scale.reshape(-1, 1, 1)

    def _dequantized(self, value: np.ndarray, scale: np.ndarray, axis: int, name: str) -> str:
        """A constant of int8 or int32, dequantized along an axis where it has several scales."""
        scale = scale.reshape(()) if scale.size == 1 else scale
        inputs = [
            self._constant(f"{name}.integers", value, value.dtype),
            self._constant(f"{name}.scale", scale, np.float32),
            self._constant(f"{name}.zero", np.zeros(scale.shape), value.dtype),
        ]
        output = self._graph.fresh(f"{name}.dequantized")
        axes = {"axis": axis} if scale.ndim else {}
        self._graph.add("DequantizeLinear", inputs, [output], name=f"{name}.dequantize", **axes)
        return output
