"""Reading an ONNX file into an `OnnxModule`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, inliner, numpy_helper
from torch import Tensor, nn

from amct_pytorch.errors import ModelError
from amct_pytorch.export.layer_nodes import LAYER_KEY
from amct_pytorch.export.onnx_file import load_onnx
from amct_pytorch.export.onnx_graph import DEFAULT_DOMAINS, names_read
from amct_pytorch.export.stored import with_data
from amct_pytorch.files import PathLike
from amct_pytorch.importing import arranging, elementwise, layers, spatial
from amct_pytorch.importing.module import OnnxModule, Step, computed
from amct_pytorch.importing.registry import OPERATORS, Operator
from amct_pytorch.importing.values import Value, host, tensor

# Imported for the operators that they register.
_TABLES = (arranging, elementwise, spatial)

QUANTIZED_OPS = frozenset(
    {
        "AscendDequant", "AscendQuant", "ConvInteger", "DequantizeLinear",
        "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QuantizeLinear",
    }
)  # fmt: skip
# Integer constants up to this size are kept as numbers too: sizes, axes, indices.
LARGEST_HOST = 4096


@dataclass(frozen=True)
class GraphInput:
    """One input of an ONNX model.

    Attributes:
        name: of it.
        shape: a number for a fixed axis, a label (empty where it has none) for another.
        dtype: NumPy's name of its element type.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class ImportedModel:
    """An ONNX model as torch module.

    Attributes:
        module: in eval mode.
        inputs: what it takes.
        layer_nodes: name of the ONNX node of each layer, by the layer's name in the module.
        dynamic_axes: the axes of inputs and outputs that are not fixed, as the flows take them.
    """

    module: OnnxModule
    inputs: tuple[GraphInput, ...]
    layer_nodes: dict[str, str]
    dynamic_axes: dict[str, dict[int, str]]


def read_onnx_module(path: PathLike, what: str = "model") -> ImportedModel:
    """The float model of an ONNX file as a torch module that every flow takes.

    Conv, ConvTranspose, Gemm and MatMul with constant weights (an Add of a constant vector behind
    them is their bias), BatchNormalization, AveragePool and Gather from a constant matrix become
    torch layers, named after their nodes; a node that carries this toolkit's ``amct.layer`` has
    that name. All other operators are functions.

    Args:
        path: ONNX file; external data beside it.
        what: the argument's name, for messages.

    Raises:
        FileMissingError, FileAccessError, ExportError: see `load_onnx`.
        ModelError: it is quantized already, or has operators that cannot be read; all are named.
    """
    return imported(load_onnx(path, what), f"{what}: {str(path)!r}")


def imported(model: onnx.ModelProto, source: str) -> ImportedModel:
    """The same of a model in memory.

    Args:
        model: with its tensors.
        source: what it is, for messages.

    Raises:
        ModelError: see `read_onnx_module`.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    _check_operators(model, source)
    return _Reader(model, source).read()


def _check_operators(model: onnx.ModelProto, source: str) -> None:
    nodes = list(model.graph.node)
    quantized = [node for node in nodes if node.op_type in QUANTIZED_OPS]
    if quantized:
        raise ModelError(
            f"{source} is quantized already: it has {len(quantized)} nodes such as "
            f"{quantized[0].op_type} {quantized[0].name!r}; give the float model"
        )
    unknown: Counter[str] = Counter()
    first: dict[str, str] = {}
    for node in nodes:
        known = node.domain in DEFAULT_DOMAINS and node.op_type in OPERATORS
        if not known and node.op_type != "Constant":
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            unknown[kind] += 1
            first.setdefault(kind, node.name)
    if unknown:
        told = ", ".join(f"{kind} ({n}, first {first[kind]!r})" for kind, n in unknown.items())
        raise ModelError(
            f"{source} has operators that cannot be read: {told}. Give the model as "
            "'module:factory', a Python function that returns the torch.nn.Module"
        )


def _operator(node: NodeProto, opset: int) -> Operator:
    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, TensorProto):
            value = numpy_helper.to_array(value)
        elif not isinstance(value, (int, float, str)):
            value = list(value)
        found[attribute.name] = value
    return Operator(node.op_type, node.name, found, opset, len(node.output))


@dataclass
class _Reader:
    """Goes through a graph once, in order."""

    model: onnx.ModelProto
    source: str
    constants: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    layer_nodes: dict[str, str] = field(default_factory=dict)
    folded_adds: dict[str, str] = field(default_factory=dict)
    _parameters: dict[tuple[str, str], nn.Parameter] = field(default_factory=dict)

    def read(self) -> ImportedModel:
        graph = self.model.graph
        opset = max(o.version for o in self.model.opset_import if o.domain in DEFAULT_DOMAINS)
        for initializer in graph.initializer:
            self.constants[initializer.name] = self._tensor(initializer)
        inputs = [value for value in graph.input if value.name not in self.constants]
        outputs = [value.name for value in graph.output]
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in names_read(node):
                self._readers.setdefault(name, []).append(node)
        self._outputs = set(outputs)
        for index, node in enumerate(graph.node):
            self._add(node, _operator(node, opset), index)
        used = {name for step in self.steps if step.layer is None for name in step.inputs}
        used.update(name for name in outputs if name in self.constants)
        kept = {name: self.constants[name] for name in self.constants if name in used}
        module = OnnxModule.taking(len(inputs))(
            [value.name for value in inputs],
            outputs,
            _with_last_uses(self.steps, self._outputs),
            kept,
            self._host_values(kept),
            self.modules,
        ).eval()
        declared = tuple(_graph_input(value) for value in inputs)
        return ImportedModel(module, declared, self.layer_nodes, self._dynamic_axes(declared))

    def _tensor(self, initializer: TensorProto) -> Tensor:
        array = numpy_helper.to_array(with_data(initializer))
        try:
            return torch.from_numpy(np.array(array))
        except TypeError as error:
            raise ModelError(
                f"{self.source}: tensor {initializer.name!r} is of type {array.dtype}, which "
                "cannot be read"
            ) from error

    def _host_values(self, kept: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Constants as numbers: integers of a moderate size, and whatever must be a number."""
        wanted = {
            name
            for step in self.steps
            if step.layer is None
            for position, name in enumerate(step.inputs)
            if position in OPERATORS[step.operator.op_type].host_inputs
        }
        return {
            name: value.numpy()
            for name, value in kept.items()
            if name in wanted
            or (
                value.dtype in (torch.int64, torch.int32, torch.bool)
                and value.numel() <= LARGEST_HOST
            )
        }

    def _dynamic_axes(self, inputs: tuple[GraphInput, ...]) -> dict[str, dict[int, str]]:
        labels = (f"axis_{number}" for number in itertools.count())
        axes = {
            given.name: {
                axis: size or next(labels)
                for axis, size in enumerate(given.shape)
                if isinstance(size, str)
            }
            for given in inputs
        }
        for value in self.model.graph.output:
            shape = _graph_input(value).shape
            axes[value.name] = {
                axis: size for axis, size in enumerate(shape) if isinstance(size, str) and size
            }
        return {name: found for name, found in axes.items() if found}

    # --- nodes ---------------------------------------------------------------------------------

    def _add(self, node: NodeProto, op: Operator, index: int) -> None:
        if op.op_type == "Constant":
            self.constants[node.output[0]] = self._constant(op)
            return
        if node.output[0] in self.folded_adds:
            return
        inputs, outputs = tuple(node.input), tuple(node.output)
        if inputs and all(not name or name in self.constants for name in inputs):
            self._fold(node, op)
            return
        built = self._layer(node, op)
        if built is None:
            self.steps.append(Step(op, inputs, outputs, None))
            return
        layer, outputs = built
        path = self._path(node, index)
        self.modules[path] = layer
        self.layer_nodes[path] = node.name or path
        data = inputs[1:2] if op.op_type == "Gather" else inputs[:1]
        self.steps.append(Step(op, data, outputs, path))

    def _constant(self, op: Operator) -> Tensor:
        for name in ("value_float", "value_floats", "value_int", "value_ints"):
            if op.get(name) is not None:
                kind = torch.float32 if "float" in name else torch.int64
                return torch.tensor(op.get(name), dtype=kind)
        value = op.get("value")
        if not isinstance(value, np.ndarray):
            raise ModelError(f"{self.source}: Constant {op.name!r} holds no tensor")
        return torch.from_numpy(np.array(value))

    def _fold(self, node: NodeProto, op: Operator) -> None:
        values: list[Value] = []
        for name in node.input:
            value = self.constants[name] if name else None
            if value is not None and value.dtype == torch.int64 and value.numel() <= LARGEST_HOST:
                values.append(host(value))
            else:
                values.append(value)
        try:
            result = computed(op, OPERATORS[op.op_type], values)
        except Exception as error:
            raise ModelError(
                f"{self.source}: {op.op_type} {op.name!r} cannot be computed: {error}"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        for name, value in zip(node.output, results, strict=False):
            self.constants[name] = tensor(value).contiguous()

    # --- layers --------------------------------------------------------------------------------

    def _layer(self, node: NodeProto, op: Operator) -> tuple[nn.Module, tuple[str, ...]] | None:
        """The layer that a node becomes, and the names of its output; None: a function."""
        outputs = tuple(node.output[:1])
        names = list(node.input)
        if op.op_type == "AveragePool":
            pool = layers.average_pool(op)
            return None if pool is None else (pool, outputs)
        if op.op_type == "Gather":
            matrix = self.constants.get(names[0])
            if matrix is None or matrix.dim() != 2 or not matrix.is_floating_point():
                return None
            return (
                None if op.get("axis", 0) else (layers.embedding(self._weight(names[0])), outputs)
            )
        if (
            len(names) < 2
            or not names[1]
            or any(name and name not in self.constants for name in names[1:])
        ):
            return None
        if not self.constants[names[1]].is_floating_point():
            return None
        build = {
            "Conv": self._convolution,
            "ConvTranspose": self._transposed,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "BatchNormalization": self._batch_norm,
        }.get(op.op_type)
        return None if build is None else build(node, op)

    def _weight(
        self, name: str, kind: str = "", change: Callable[[Tensor], Tensor] = lambda t: t
    ) -> nn.Parameter:
        """The parameter of a constant; one for all nodes that read it in the same way."""
        if (name, kind) not in self._parameters:
            value = change(self.constants[name]).detach().clone()
            self._parameters[name, kind] = nn.Parameter(value, requires_grad=False)
        return self._parameters[name, kind]

    def _bias(self, names: list[str], position: int = 2) -> nn.Parameter | None:
        present = len(names) > position and names[position]
        # One of its own for each layer: the toolkit corrects biases.
        return nn.Parameter(self.constants[names[position]].clone(), False) if present else None

    def _convolution(
        self, node: NodeProto, op: Operator
    ) -> tuple[nn.Module, tuple[str, ...]] | None:
        weight, bias = self._weight(node.input[1]), self._bias(list(node.input))
        built = layers.convolution(op, weight, bias)
        return None if built is None else (built, (node.output[0],))

    def _transposed(
        self, node: NodeProto, op: Operator
    ) -> tuple[nn.Module, tuple[str, ...]] | None:
        weight, bias = self._weight(node.input[1]), self._bias(list(node.input))
        built = layers.transposed_convolution(op, weight, bias)
        return None if built is None else (built, (node.output[0],))

    def _gemm(self, node: NodeProto, op: Operator) -> tuple[nn.Module, tuple[str, ...]] | None:
        alpha, beta = op.get("alpha", 1.0), op.get("beta", 1.0)
        if op.get("transA", 0):
            return None
        flip = not op.get("transB", 0)
        weight = self._weight(
            node.input[1],
            f"{flip} {alpha}",
            lambda t: ((t.t() if flip else t) * (1 if alpha == 1 else alpha)).contiguous(),
        )
        bias = None
        if len(node.input) > 2 and node.input[2]:
            vector = self._as_vector(node.input[2], weight.shape[0])
            if vector is None:
                return None
            bias = nn.Parameter(vector * beta if beta != 1 else vector.clone(), False)
        return layers.linear(weight, bias), (node.output[0],)

    def _matmul(self, node: NodeProto, op: Operator) -> tuple[nn.Module, tuple[str, ...]] | None:
        if self.constants[node.input[1]].dim() != 2:
            return None
        weight = self._weight(node.input[1], "matmul", lambda t: t.t().contiguous())
        output = node.output[0]
        readers = self._readers.get(output, [])
        if len(readers) == 1 and readers[0].op_type == "Add" and output not in self._outputs:
            others = [name for name in readers[0].input if name != output]
            vector = self._as_vector(others[0], weight.shape[0]) if len(others) == 1 else None
            if vector is not None:
                self.folded_adds[readers[0].output[0]] = node.name
                bias = nn.Parameter(vector.clone(), False)
                return layers.linear(weight, bias), (readers[0].output[0],)
        return layers.linear(weight, None), (output,)

    def _as_vector(self, name: str, size: int) -> Tensor | None:
        """A constant that adds one number to each of `size` outputs, as [size]."""
        value = self.constants.get(name)
        if value is None or value.numel() not in (1, size):
            return None
        if value.numel() == size and value.dim() and value.shape[-1] != size:
            return None
        if value.dim() > 2:
            return None
        return value.reshape(-1).expand(size)

    def _batch_norm(
        self, node: NodeProto, op: Operator
    ) -> tuple[nn.Module, tuple[str, ...]] | None:
        if op.get("training_mode", 0):
            raise ModelError(f"{self.source}: {op.name!r} is a BatchNormalization in training mode")
        scale, bias = self._weight(node.input[1]), self._weight(node.input[2])
        mean, variance = (self.constants[name].clone() for name in node.input[3:5])
        return layers.batch_norm(op, scale, bias, mean, variance), (node.output[0],)

    def _path(self, node: NodeProto, index: int) -> str:
        """A dotted path for a node's layer: its name, changed only where it must be."""
        stored = {entry.key: entry.value for entry in node.metadata_props}
        wanted = stored.get(LAYER_KEY) or node.name or f"{node.op_type}_{index}"
        parts = wanted.split(".")
        clash = any(not part or hasattr(nn.Module, part) for part in parts)
        path = "_".join(filter(None, parts)) if clash else wanted
        if clash and hasattr(nn.Module, path):
            path += "_layer"
        number = 1
        free = path
        while not self._is_free(free):
            free, number = f"{path.replace('.', '_')}_{number}", number + 1
        return free

    def _is_free(self, path: str) -> bool:
        root = path.split(".")[0]
        reserved = {"constants", "training", "input_names", "output_names"}
        return root not in reserved and not any(
            other == path or other.startswith(f"{path}.") or path.startswith(f"{other}.")
            for other in self.modules
        )


def _with_last_uses(steps: list[Step], outputs: set[str]) -> list[Step]:
    last = {name: i for i, step in enumerate(steps) for name in (*step.inputs, *step.outputs)}
    done: list[list[str]] = [[] for _ in steps]
    for name, i in last.items():
        if name not in outputs:
            done[i].append(name)
    return [replace(step, last_use=tuple(done[i])) for i, step in enumerate(steps)]


def _graph_input(value: onnx.ValueInfoProto) -> GraphInput:
    kind = value.type.tensor_type
    shape = tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim
    )
    return GraphInput(
        value.name, shape, str(np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name)
    )


__all__ = ["GraphInput", "ImportedModel", "read_onnx_module"]
