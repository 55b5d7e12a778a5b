"""Exact integer layers out of ONNX Runtime's operators: which there are, which hold here.

ONNX Runtime's integer kernels may add pairs of products in 16 bits on processors without dot
product instructions, and saturate. So they are tried once per process on the worst inputs, and
only what came out exact is used; float32 operators are exact wherever no sum can pass 2^24.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, TensorProto, helper

from amct_pytorch.export.integer_layer import EXACT_FLOAT32, largest_sum
from amct_pytorch.export.onnx_graph import OnnxGraph
from amct_pytorch.export.opset import IR_VERSION, OPSET
from amct_pytorch.formats.integer import INT8, IntFormat
from amct_pytorch.graph.weight_layout import WeightLayout


@dataclass(frozen=True)
class IntegerOp:
    """Sums of products of integers that some operators shall compute exactly.

    Attributes:
        op_type: Conv, ConvTranspose, or MatMul.
        weight: int8 weights as that operator takes them.
        offset: zero point of the input, which is of `format`.
        attributes: the operator's own.
        format: of the input.
    """

    op_type: str
    weight: np.ndarray
    offset: int
    attributes: Sequence[AttributeProto] = ()
    format: IntFormat = INT8

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        return next((int(a.i) for a in self.attributes if a.name == "group"), 1)

    @property
    def layout(self) -> WeightLayout:
        """Which weights are summed up together."""
        if self.op_type == "ConvTranspose":
            return WeightLayout(1, self.groups)
        return WeightLayout(0 if self.op_type == "Conv" else 1)

    def largest_sum(self, weight: np.ndarray | None = None) -> int:
        """Largest |sum| that any input can give with `weight` (default: its own)."""
        weight = self.weight if weight is None else weight
        return largest_sum(weight, None, self.layout, self.offset, self.format.bits)


@dataclass(frozen=True)
class Kernel:
    """One way to compute an `IntegerOp`.

    Attributes:
        name: for choosing and messages.
        input_form: ``uint8`` (q + 128) or ``centred`` (float32 q - offset).
        fits: whether it can compute an operator, on a machine where it is exact.
        write: adds its nodes: (graph, operator, input, output); the output is int32.
    """

    name: str
    input_form: str
    fits: Callable[[IntegerOp], bool]
    write: Callable[[OnnxGraph, IntegerOp, str, str], None]


def _write_integer(weight_shift: int) -> Callable[[OnnxGraph, IntegerOp, str, str], None]:
    def write(graph: OnnxGraph, op: IntegerOp, x: str, y: str) -> None:
        weight = op.weight
        if weight_shift:
            weight = (weight.astype(np.int16) + weight_shift).astype(np.uint8)
        zero_x = np.array(op.offset + 128, np.uint8)
        zero_w = np.array(weight_shift, weight.dtype)
        inputs = [x] + [
            graph.set_array(graph.fresh(f"{y}.{what}"), value)
            for what, value in (("weight", weight), ("zero_x", zero_x), ("zero_w", zero_w))
        ]
        node = graph.add(f"{op.op_type}Integer", inputs, [y])
        node.attribute.extend(op.attributes)

    return write


def _write_float_part(graph: OnnxGraph, op: IntegerOp, weight: np.ndarray, x: str, y: str) -> None:
    name = graph.set_array(graph.fresh(f"{y}.weight"), weight.astype(np.float32))
    total = graph.fresh(f"{y}.sum")
    graph.add(op.op_type, [x, name], [total]).attribute.extend(op.attributes)
    graph.add("Cast", [total], [y], to=TensorProto.INT32)


def _write_float(graph: OnnxGraph, op: IntegerOp, x: str, y: str) -> None:
    _write_float_part(graph, op, op.weight, x, y)


def exact_parts(op: IntegerOp) -> Iterator[tuple[np.ndarray, int]]:
    """Weights and factors that add up to the operator's weights, each part exact in float32.

    Nibbles first (two parts, sixteen times smaller sums), then halves along the inputs.
    """
    high = (op.weight.astype(np.int16) + 8) >> 4
    low = op.weight.astype(np.int16) - 16 * high

    def halves(weight: np.ndarray, factor: int) -> Iterator[tuple[np.ndarray, int]]:
        if op.largest_sum(weight) <= EXACT_FLOAT32:
            yield weight, factor
            return
        # Positions that every channel has: the other axes' (of one group).
        axis = op.layout.out_axis
        rows = np.moveaxis(weight, axis, 0)
        flat = rows.reshape(rows.shape[0], -1)
        used = np.flatnonzero(flat.any(axis=0))
        for keep in np.array_split(used, 2):
            part = np.zeros_like(flat)
            part[:, keep] = flat[:, keep]
            yield from halves(np.moveaxis(part.reshape(rows.shape), 0, axis), factor)

    yield from halves(high, 16)
    yield from halves(low, 1)


def _write_split(graph: OnnxGraph, op: IntegerOp, x: str, y: str) -> None:
    parts = list(exact_parts(op))
    total = ""
    for i, (weight, factor) in enumerate(parts):
        part = graph.fresh(f"{y}.part{i}")
        _write_float_part(graph, op, weight, x, part)
        if factor != 1:
            scaled = graph.fresh(f"{part}.scaled")
            times = graph.set_array(graph.fresh(f"{part}.factor"), np.array(factor, np.int32))
            graph.add("Mul", [part, times], [scaled])
            part = scaled
        if total:
            added = y if i == len(parts) - 1 else graph.fresh(f"{y}.total{i}")
            graph.add("Add", [total, part], [added])
            part = added
        total = part


def _has_integer_operator(op: IntegerOp) -> bool:
    return op.op_type in ("Conv", "MatMul") and op.format.bits == 8


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("u8s8", "uint8", _has_integer_operator, _write_integer(0)),
        Kernel("u8u8", "uint8", _has_integer_operator, _write_integer(128)),
        Kernel("float32", "centred", lambda op: op.largest_sum() <= EXACT_FLOAT32, _write_float),
        Kernel("split", "centred", lambda op: True, _write_split),
    )
}


def choose_kernel(op: IntegerOp, names: Sequence[str] | None = None) -> Kernel:
    """The kernel for one operator.

    Args:
        op: the operator.
        names: kernels to choose among, first that fits first; default: those exact on this
            machine, fastest first (for grouped convolutions float32 first, because integer
            operators handle one group at a time).
    """
    if names is None:
        names = exact_kernels(op.op_type)
        if op.groups > 1:
            names = ["float32", *names]
    for name in names:
        if KERNELS[name].fits(op):
            return KERNELS[name]
    return KERNELS["split"]


@functools.cache
def exact_kernels(op_type: str) -> tuple[str, ...]:
    """Names of the kernels that are exact on this machine, fastest first, ``split`` last."""
    times = {}
    for name in ("u8u8", "u8s8", "float32"):
        took = _try_kernel(KERNELS[name], op_type)
        if took is not None:
            times[name] = took
    return (*sorted(times, key=lambda name: times[name]), "split")


def _try_kernel(kernel: Kernel, op_type: str) -> float | None:
    """Seconds for the trial of usual size, or None where any trial was not exact."""
    took = None
    for op, x in trials(op_type):
        if not kernel.fits(op):
            continue
        try:
            session = _trial_session(kernel, op, x)
            feeds = {"x": _in_form(x, op.offset, kernel.input_form)}
            started = time.perf_counter()
            found = session.run(None, feeds)[0]
            took = time.perf_counter() - started
        except Exception:  # the operator is missing here, in whatever way
            return None
        if not np.array_equal(found, reference(op, x)):
            return None
    return took


def _in_form(x: np.ndarray, offset: int, form: str) -> np.ndarray:
    shift, dtype = (128, np.uint8) if form == "uint8" else (-offset, np.float32)
    shifted: np.ndarray = (x.astype(np.int32) + shift).astype(dtype)
    return shifted


def _trial_session(kernel: Kernel, op: IntegerOp, x: np.ndarray) -> ort.InferenceSession:
    kind = TensorProto.UINT8 if kernel.input_form == "uint8" else TensorProto.FLOAT
    graph = OnnxGraph(onnx.ModelProto())
    graph.inputs.append(helper.make_tensor_value_info("x", kind, x.shape))
    graph.outputs.append(helper.make_tensor_value_info("y", TensorProto.INT32, None))
    kernel.write(graph, op, "x", "y")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = graph.model(opset=OPSET, ir_version=IR_VERSION)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def trials(op_type: str) -> Iterator[tuple[IntegerOp, np.ndarray]]:
    """Operators and int8 inputs that bring inexact kernels to light; the last is of usual size.

    Both ends of every range, odd and even sizes, padding with zero points of both signs,
    depthwise and grouped, one row and many.
    """
    rng = np.random.default_rng(0)

    def extremes(*shape: int) -> np.ndarray:
        return rng.choice(np.array([-128, 127], np.int8), shape)

    def high(*shape: int) -> np.ndarray:
        return np.full(shape, 127, np.int8)

    if op_type == "MatMul":
        for shape in ((1, 64), (3, 5, 37), (4, 1, 130), (64, 256)):
            for offset in (-128, 0, 127):
                yield IntegerOp("MatMul", extremes(shape[-1], 19), offset), extremes(*shape)
            yield IntegerOp("MatMul", high(shape[-1], 33), -128), high(*shape)
            yield IntegerOp("MatMul", -1 - high(shape[-1], 33), -128), high(*shape)
        return
    pads = helper.make_attribute("pads", [1, 0, 2, 1])
    for channels, out, groups, size in (
        (13, 6, 1, 5),
        (16, 16, 16, 7),
        (12, 8, 4, 6),
        (64, 64, 1, 24),
    ):
        attributes = (pads, helper.make_attribute("group", groups))
        for offset in (-128, 5, 127):
            weight = extremes(out, channels // groups, 3, 3)
            yield IntegerOp("Conv", weight, offset, attributes), extremes(2, channels, size, size)
        for weight in (
            high(out, channels // groups, 3, 3),
            -1 - high(out, channels // groups, 3, 3),
        ):
            yield IntegerOp("Conv", weight, -128, attributes), high(1, channels, size, size)


def reference(op: IntegerOp, x: np.ndarray) -> np.ndarray:
    """The operator's sums for int8 inputs `x`, in int64: what every kernel must give.

    MatMul, and Conv with pads, groups and strides and dilations of 1, in two dimensions.
    """
    values = x.astype(np.int64) - op.offset
    weight = op.weight.astype(np.int64)
    if op.op_type == "MatMul":
        product: np.ndarray = values @ weight
        return product
    pads = next((a.ints for a in op.attributes if a.name == "pads"), [0] * 4)
    values = np.pad(values, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    windows = np.lib.stride_tricks.sliding_window_view(values, weight.shape[2:], axis=(2, 3))
    grouped = np.split(windows, op.groups, axis=1)
    parts = [
        # In float64, where these sums are exact too and the product is a fast one.
        np.tensordot(g.astype(np.float64), w.astype(np.float64), axes=((1, 4, 5), (1, 2, 3)))
        for g, w in zip(grouped, np.split(weight, op.groups), strict=True)
    ]
    sums: np.ndarray = np.concatenate(parts, axis=3).transpose(0, 3, 1, 2).astype(np.int64)
    return sums
