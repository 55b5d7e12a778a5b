"""Running a deploy model on the CPU with its own integer arithmetic."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ExportError,
    did_you_mean,
)
from amct_pytorch.export.deploy_reader import POOLING, DeployLayer, DeployModel, Quantizer
from amct_pytorch.export.integer_kernels import IntegerOp, choose_kernel
from amct_pytorch.export.onnx_file import LARGEST_FILE, load_onnx, save_onnx
from amct_pytorch.export.opset import IR_VERSION
from amct_pytorch.files import PathLike


class DeploySession:
    """Runs a deploy model like an ONNX Runtime session, every integer exact.

    AscendQuant, int8 x int8 -> int32 layers and AscendDequant are computed as the deploy model
    defines them; all other operators are ONNX Runtime's own. Which kernels compute the
    integers is chosen per layer among those that a check at start found exact on this machine,
    so results are the same on every machine. ConvTranspose, which has no integer kernel, runs
    in float32 parts small enough to be exact.

    Besides the model's outputs, `run` gives any tensor of the deploy graph by its name: the
    integers that enter a layer (int8, ``L.quant.output0``) and those that leave it (int32, the
    input of ``L.dequant``) among them; see `layers`.

    Args:
        deploy_model_file: a deploy model, from this toolkit or another with the same operators.
        session_options: ONNX Runtime options (threads, …) for the sessions underneath.
        kernels: names of the kernels to choose among, for tests and measurements.

    Raises:
        FileMissingError: there is no such file.
        ExportError: it is no ONNX model, has operators that are not known, or its integer
            layers are put together in a way that has no meaning.
    """

    def __init__(
        self,
        deploy_model_file: PathLike,
        session_options: ort.SessionOptions | None = None,
        *,
        kernels: Sequence[str] | None = None,
    ) -> None:
        self._model = load_onnx(deploy_model_file, "deploy_model_file")
        self._options = session_options or ort.SessionOptions()
        self._kernels = kernels
        self._extra: dict[tuple[str, ...], ort.InferenceSession] = {}
        deploy = DeployModel(self._model)
        self._layers = {layer.name: (layer.quantizer.output, layer.raw) for layer in deploy.layers}
        self._tensors = {name for node in deploy.graph.nodes for name in node.output if name}
        self._session = self._make_session(())

    @property
    def layers(self) -> dict[str, tuple[str, str]]:
        """Layer name -> names of its integer tensors: what enters (int8), what leaves (int32)."""
        return dict(self._layers)

    def get_inputs(self) -> list[Any]:
        """The model's inputs (ONNX Runtime NodeArg: name, shape, type)."""
        return list(self._session.get_inputs())

    def get_outputs(self) -> list[Any]:
        """The model's outputs (ONNX Runtime NodeArg: name, shape, type)."""
        return list(self._session.get_outputs())

    def run(
        self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Run the model once.

        Args:
            output_names: names of tensors of the deploy graph; None: all model outputs.
            feeds: array for each model input, by name.

        Returns:
            One array per name, in their order.

        Raises:
            ArgumentValueError: an unknown or missing name, or a shape that does not fit.
            ArgumentTypeError: an array of another type than the model's input.
            ExportError: ONNX Runtime cannot run the model with these inputs.
        """
        own = [o.name for o in self.get_outputs()]
        names = own if output_names is None else list(output_names)
        for name in names:
            if name not in own and name not in self._tensors:
                hint = did_you_mean(name, [*own, *self._tensors])
                raise ArgumentValueError(f"output_names: the model has no tensor {name!r}{hint}")
        self._check_feeds(feeds)
        extra = tuple(sorted(set(names) - set(own)))
        if extra and extra not in self._extra:
            self._extra[extra] = self._make_session(extra)
        session = self._extra[extra] if extra else self._session
        try:
            return list(session.run(names, dict(feeds)))
        except Exception as error:
            raise ExportError(f"the deploy model cannot be run: {error}") from error

    def _check_feeds(self, feeds: Mapping[str, np.ndarray]) -> None:
        inputs = {i.name: i for i in self.get_inputs()}
        for name in feeds:
            if name not in inputs:
                hint = did_you_mean(name, inputs)
                raise ArgumentValueError(
                    f"feeds: the model has no input {name!r}{hint}; it has " + ", ".join(inputs)
                )
        for name, wanted in inputs.items():
            if name not in feeds:
                raise ArgumentValueError(f"feeds: input {name!r} is missing")
            value = feeds[name]
            if not isinstance(value, np.ndarray):
                raise ArgumentTypeError(
                    f"feeds: {name!r} is of type {type(value).__name__}; numpy.ndarray is needed"
                )
            if _onnx_type(value.dtype) != wanted.type:
                raise ArgumentTypeError(
                    f"feeds: {name!r} is of type {value.dtype}; {wanted.type} is needed"
                )
            fixed = [d if isinstance(d, int) else None for d in wanted.shape]
            if len(fixed) != value.ndim or any(
                d is not None and d != n for d, n in zip(fixed, value.shape, strict=False)
            ):
                raise ArgumentValueError(
                    f"feeds: {name!r} has shape {list(value.shape)}; {wanted.shape} is needed"
                )

    def _make_session(self, extra: Sequence[str]) -> ort.InferenceSession:
        stock = stock_model(DeployModel(self._model), extra, self._kernels)
        try:
            return _open_session(stock, self._options)
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot load the deploy model: {error}") from error


def _onnx_type(dtype: np.dtype) -> str:
    names = {"float32": "float", "float64": "double"}
    return f"tensor({names.get(dtype.name, dtype.name)})"


def _open_session(model: onnx.ModelProto, options: ort.SessionOptions) -> ort.InferenceSession:
    # This fusion multiplies in an order of its own.
    settings: dict[str, Any] = {
        "providers": ["CPUExecutionProvider"],
        "disabled_optimizers": ["MatMulIntegerToFloatFusion"],
    }
    if sum(len(t.raw_data) for t in model.graph.initializer) < LARGEST_FILE:
        return ort.InferenceSession(model.SerializeToString(), options, **settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        return ort.InferenceSession(str(path), options, **settings)


def stock_model(
    deploy: DeployModel, extra: Sequence[str] = (), kernels: Sequence[str] | None = None
) -> onnx.ModelProto:
    """A stock ONNX model that computes what a deploy model defines, tensor names kept.

    Args:
        deploy: the deploy model; its graph is used up.
        extra: names of further tensors to make outputs.
        kernels: names of the kernels to choose among; default: what is exact here.
    """
    writer = _StockWriter(deploy)
    for layer in deploy.layers:
        writer.write_layer(layer, kernels)
    for quantizer in deploy.quantizers.values():
        writer.write_quantized(quantizer)
    graph = deploy.graph
    graph.remove([q.node for q in deploy.quantizers.values()])
    graph.outputs.extend(onnx.ValueInfoProto(name=name) for name in extra)
    model = graph.model(opset=deploy.opset, ir_version=IR_VERSION)
    # Types and shapes of what is in between are ONNX Runtime's to find.
    del model.graph.value_info[:]
    return model


class _StockWriter:
    """Writes stock operators in place of the deploy model's own."""

    def __init__(self, deploy: DeployModel) -> None:
        self._deploy = deploy
        self._graph = deploy.graph
        self._forms: dict[tuple[str, str], str] = {}

    def _constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        return self._graph.set_array(self._graph.fresh(name), np.asarray(value, dtype))

    def _step(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        output = self._graph.fresh(name)
        self._graph.add(op_type, inputs, [output], **attributes)
        return output

    def _rounded(self, quantizer: Quantizer) -> str:
        """round(x / scale), before offset and clipping."""
        key = (quantizer.output, "rounded")
        if key not in self._forms:
            name = quantizer.output
            as_float = self._step("Cast", [quantizer.source], f"{name}.float", to=TensorProto.FLOAT)
            factor = self._constant(f"{name}.scale", quantizer.inverse_scale)
            scaled = self._step("Mul", [as_float, factor], f"{name}.mul")
            self._forms[key] = self._step("Round", [scaled], f"{name}.round")
        return self._forms[key]

    def _clipped(self, quantizer: Quantizer, shift: int, what: str) -> str:
        """Float clip(round(x / scale) + offset) + shift, added up before the clipping."""
        name, fmt = quantizer.output, quantizer.format
        value = self._rounded(quantizer)
        if quantizer.offset + shift:
            add = self._constant(f"{name}.{what}.offset", quantizer.offset + shift)
            value = self._step("Add", [value, add], f"{name}.{what}.add")
        low = self._constant(f"{name}.{what}.low", fmt.qmin + shift)
        high = self._constant(f"{name}.{what}.high", fmt.qmax + shift)
        return self._step("Clip", [value, low, high], f"{name}.{what}.clip")

    def write_quantized(self, quantizer: Quantizer) -> None:
        """The int8 tensor under its name in the deploy graph."""
        value = self._clipped(quantizer, 0, "int8")
        self._graph.add("Cast", [value], [quantizer.output], to=TensorProto.INT8)

    def _input(self, tensor: str, quantizer: Quantizer, form: str) -> str:
        """A layer's integer input in the form a kernel takes."""
        key = (tensor, form)
        if key in self._forms:
            return self._forms[key]
        shift, kind = {
            "uint8": (128, TensorProto.UINT8),
            "centred": (-quantizer.offset, TensorProto.FLOAT),
        }[form]
        if tensor == quantizer.output:
            value = self._clipped(quantizer, shift, form)
        else:  # the integers were reshaped on the way
            as_float = self._step("Cast", [tensor], f"{tensor}.float", to=TensorProto.FLOAT)
            add = self._constant(f"{tensor}.{form}.shift", shift)
            value = self._step("Add", [as_float, add], f"{tensor}.{form}.add")
        if kind != TensorProto.FLOAT:
            value = self._step("Cast", [value], f"{tensor}.{form}", to=kind)
        self._forms[key] = value
        return value

    def write_layer(self, layer: DeployLayer, kernels: Sequence[str] | None) -> None:
        """One layer: its sums, its bias, its AscendDequant."""
        source, raw = str(layer.node.input[0]), str(layer.node.output[0])
        if layer.node.op_type in POOLING:
            layer.node.input[0] = self._input(source, layer.quantizer, "centred")
        else:
            self._write_sums(layer, source, raw, kernels)
        self._write_dequant(layer)

    def _write_sums(
        self, layer: DeployLayer, source: str, raw: str, kernels: Sequence[str] | None
    ) -> None:
        assert layer.weight is not None
        matrix = layer.node.op_type in ("Gemm", "MatMul")
        op = IntegerOp(
            "MatMul" if matrix else layer.node.op_type,
            layer.weight,
            layer.quantizer.offset,
            () if matrix else tuple(layer.node.attribute),
            layer.quantizer.format,
        )
        kernel = choose_kernel(op, kernels)
        value = self._input(source, layer.quantizer, kernel.input_form)
        self._graph.remove([layer.node])
        inside = layer.bias is not None and layer.last is layer.node
        sums = self._graph.fresh(f"{raw}.sums") if inside else raw
        kernel.write(self._graph, op, value, sums)
        if inside:
            shape = [-1] if matrix else [-1] + [1] * (layer.weight.ndim - 2)
            assert layer.bias is not None
            bias = self._constant(f"{raw}.bias", layer.bias.reshape(shape), np.int32)
            self._graph.add("Add", [sums, bias], [raw])

    def _write_dequant(self, layer: DeployLayer) -> None:
        scale = layer.scale
        if scale.size == 1:
            scale = scale.reshape(())
        elif layer.weight is None or layer.node.op_type not in ("Gemm", "MatMul"):
            spatial = 2 if layer.weight is None else layer.weight.ndim - 2
            scale = scale.reshape([-1] + [1] * spatial)
        half = layer.float_type != TensorProto.FLOAT
        value = self._step("Cast", [layer.raw], f"{layer.raw}.float", to=TensorProto.FLOAT)
        factor = self._constant(f"{layer.output}.scale", scale)
        product = self._graph.fresh(f"{layer.output}.float") if half else layer.output
        self._replace(layer.dequant, helper.make_node("Mul", [value, factor], [product]))
        if half:
            self._graph.add("Cast", [product], [layer.output], to=layer.float_type)

    def _replace(self, old: NodeProto, new: NodeProto) -> None:
        self._graph.remove([old])
        self._graph.nodes.append(new)
