"""Operators that work on each element, and reductions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from amct_pytorch.importing.registry import Operator, operator
from amct_pytorch.importing.values import Value, host, integers, scalar

# ONNX's numbers of element types (onnx.TensorProto.DataType).
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32,
    7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil,
    "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Log": torch.log,
    "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": F.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip

_HOST_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Equal": np.equal,
    "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal,
}  # fmt: skip


def _host_binary(name: str) -> Callable[[Operator, np.ndarray, np.ndarray], np.ndarray]:
    def compute(_: Operator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(_HOST_BINARY[name](a, b))

    return compute


def _register_tables() -> None:
    for name, unary in _UNARY.items():
        operator(name)(functools.partial(lambda function, _, x: function(x), unary))
    for name, binary in _BINARY.items():
        on_host = _host_binary(name) if name in _HOST_BINARY else None
        operator(name, on_host=on_host)(
            functools.partial(lambda function, _, a, b: function(a, b), binary)
        )


_register_tables()


# Tensor methods are what traces of other models have too: `a + b`, not `torch.add(a, b)`.
@operator("Add", on_host=_host_binary("Add"))
def _add(_: Operator, a: Tensor, b: Tensor) -> Tensor:
    return a + b


@operator("Sub", on_host=_host_binary("Sub"))
def _sub(_: Operator, a: Tensor, b: Tensor) -> Tensor:
    return a - b


@operator("Mul", on_host=_host_binary("Mul"))
def _mul(_: Operator, a: Tensor, b: Tensor) -> Tensor:
    return a * b


def _host_div(_: Operator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(a // b)  # sizes, never below zero


@operator("Div", on_host=_host_div)
def _div(_: Operator, a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


@operator("Pow")
def _pow(_: Operator, a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


@operator("Mod")
def _mod(op: Operator, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if op.get("fmod", 0) else torch.remainder(a, b)


def _host_where(_: Operator, choose: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(choose.astype(bool), a, b)


@operator("Where", on_host=_host_where)
def _where(_: Operator, choose: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(choose, a, b)


@operator("Max")
def _max(_: Operator, *xs: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, xs)


@operator("Min")
def _min(_: Operator, *xs: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, xs)


@operator("Sum")
def _sum(_: Operator, *xs: Tensor) -> Tensor:
    return functools.reduce(torch.add, xs)


@operator("Mean")
def _mean(_: Operator, *xs: Tensor) -> Tensor:
    return functools.reduce(torch.add, xs) / len(xs)


@operator("IsInf")
def _isinf(op: Operator, x: Tensor) -> Tensor:
    negative = torch.isneginf(x) & bool(op.get("detect_negative", 1))
    return negative | (torch.isposinf(x) & bool(op.get("detect_positive", 1)))


@operator("Clip", host_inputs=(1, 2))
def _clip(op: Operator, x: Tensor, low: Value = None, high: Value = None) -> Tensor:
    bottom = op.get("min") if low is None else scalar(low)
    top = op.get("max") if high is None else scalar(high)
    if x.is_floating_point() and bottom == 0 and top == 6:
        return F.relu6(x)
    if bottom is None and top is None:
        return x
    return torch.clamp(x, bottom, top)


@operator("LeakyRelu")
def _leaky_relu(op: Operator, x: Tensor) -> Tensor:
    return F.leaky_relu(x, op.get("alpha", 0.01))


@operator("Elu")
def _elu(op: Operator, x: Tensor) -> Tensor:
    return F.elu(x, op.get("alpha", 1.0))


@operator("Celu")
def _celu(op: Operator, x: Tensor) -> Tensor:
    return F.celu(x, op.get("alpha", 1.0))


@operator("Selu")
def _selu(op: Operator, x: Tensor) -> Tensor:
    alpha, gamma = op.get("alpha", 1.67326319217681884765625), op.get("gamma", 1.0507010221481323)
    positive, negative = torch.clamp(x, min=0), torch.clamp(alpha * (torch.exp(x) - 1), max=0)
    scaled: Tensor = gamma * (positive + negative)
    return scaled


@operator("ThresholdedRelu")
def _thresholded_relu(op: Operator, x: Tensor) -> Tensor:
    return F.threshold(x, op.get("alpha", 1.0), 0.0)


@operator("HardSigmoid")
def _hard_sigmoid(op: Operator, x: Tensor) -> Tensor:
    return torch.clamp(x * op.get("alpha", 0.2) + op.get("beta", 0.5), 0, 1)


@operator("Gelu")
def _gelu(op: Operator, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=op.get("approximate", "none"))


@operator("PRelu")
def _prelu(_: Operator, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Softmax")
def _softmax(op: Operator, x: Tensor) -> Tensor:
    return _along(op, x, F.softmax)


@operator("LogSoftmax")
def _log_softmax(op: Operator, x: Tensor) -> Tensor:
    return _along(op, x, F.log_softmax)


def _along(op: Operator, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    if op.opset >= 13:
        return function(x, dim=op.get("axis", -1))
    # Before opset 13: over all axes from this one on, as one.
    axis = op.get("axis", 1) % max(x.dim(), 1)
    return function(x.flatten(axis), dim=-1).reshape(x.shape)


def _host_cast(op: Operator, x: np.ndarray) -> Any:
    kind = DTYPES.get(op.get("to"))
    if kind in (torch.int64, torch.int32):
        return x if x.dtype == object else x.astype(np.int64)
    return NotImplemented


@operator("Cast", on_host=_host_cast)
def _cast(op: Operator, x: Tensor) -> Tensor:
    return x.to(DTYPES[op.get("to")])


@operator("CastLike")
def _cast_like(_: Operator, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@operator("Identity", "Dropout", on_host=lambda _, x, *__: x)
def _identity(op: Operator, x: Tensor, *more: Tensor) -> Tensor:
    if op.outputs > 1 or (len(more) > 1 and bool(more[1])):
        raise NotImplementedError("Dropout in training")
    return x


# --- reductions ------------------------------------------------------------------------------


def _reduced(op: Operator, x: Tensor, axes: Value) -> tuple[list[int], bool] | None:
    """Axes and keepdims; None: nothing is to be reduced."""
    wanted = op.get("axes") if axes is None else integers(axes)
    keep = bool(op.get("keepdims", 1))
    if not wanted:
        if op.get("noop_with_empty_axes", 0):
            return None
        wanted = range(x.dim())
    return sorted(axis % x.dim() for axis in wanted), keep


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


def _register_reductions() -> None:
    def compute(
        function: Callable[..., Tensor], op: Operator, x: Tensor, axes: Value = None
    ) -> Tensor:
        found = _reduced(op, x, axes)
        return x if found is None else function(x, *found)

    for name, function in _REDUCTIONS.items():
        operator(name, host_inputs=(1,))(functools.partial(compute, function))


_register_reductions()


def _host_prod(op: Operator, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    wanted = op.get("axes") if axes is None else integers(axes)
    where = tuple(wanted) if wanted else None
    return np.asarray(np.prod(x, axis=where, keepdims=bool(op.get("keepdims", 1))))


@operator("ReduceProd", host_inputs=(1,), on_host=_host_prod)
def _reduce_prod(op: Operator, x: Tensor, axes: Value = None) -> Tensor:
    found = _reduced(op, x, axes)
    if found is None:
        return x
    for axis in reversed(found[0]):
        x = x.prod(axis, found[1])
    return x


def _arg(op: Operator, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    axis, keep = op.get("axis", 0) % x.dim(), bool(op.get("keepdims", 1))
    last = bool(op.get("select_last_index", 0))
    found: Tensor = function(x.flip(axis) if last else x, axis, keep)
    return x.shape[axis] - 1 - found if last else found


@operator("ArgMax")
def _argmax(op: Operator, x: Tensor) -> Tensor:
    return _arg(op, x, torch.argmax)


@operator("ArgMin")
def _argmin(op: Operator, x: Tensor) -> Tensor:
    return _arg(op, x, torch.argmin)


@operator("CumSum", host_inputs=(1,))
def _cumsum(op: Operator, x: Tensor, axis: Value) -> Tensor:
    dim = int(scalar(axis))
    backwards = bool(op.get("reverse", 0))
    x = x.flip(dim) if backwards else x
    total = x.cumsum(dim, dtype=x.dtype)
    total = total - x if op.get("exclusive", 0) else total
    return total.flip(dim) if backwards else total


@operator("TopK", host_inputs=(1,))
def _topk(op: Operator, x: Tensor, k: Value) -> tuple[Tensor, Tensor]:
    found = torch.topk(
        x, int(scalar(k)), op.get("axis", -1), bool(op.get("largest", 1)), bool(op.get("sorted", 1))
    )
    return found.values, found.indices


@operator("Einsum")
def _einsum(op: Operator, *xs: Tensor) -> Tensor:
    return torch.einsum(op.get("equation"), *xs)


@operator("MatMul")
def _matmul(_: Operator, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
def _gemm(op: Operator, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if op.get("transA", 0) else a
    b = b.t() if op.get("transB", 0) else b
    product: Tensor = torch.matmul(a, b) * op.get("alpha", 1.0)
    return product if c is None else product + c * op.get("beta", 1.0)


def _host_range(_: Operator, *ends: np.ndarray) -> Any:
    numbers = [host(end).reshape(-1)[0] for end in ends]
    if not all(isinstance(number, (int, np.integer)) for number in numbers):
        return NotImplemented
    return np.arange(*numbers, dtype=np.int64)


@operator("Range", host_inputs=(0, 1, 2), on_host=_host_range)
def _range(_: Operator, start: Value, limit: Value, delta: Value) -> Tensor:
    ends = [host(end).reshape(-1)[0] for end in (start, limit, delta)]
    ends = [end.item() if isinstance(end, np.generic) else end for end in ends]
    known = host(start).dtype
    dtype = torch.int64 if known.hasobject else torch.from_numpy(host(start)).dtype
    return torch.arange(*ends, dtype=dtype)


@operator("LayerNormalization")
def _layer_norm(
    op: Operator, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    axis = op.get("axis", -1) % x.dim()
    shape = x.shape[axis:]
    eps = op.get("epsilon", 1e-5)
    y = F.layer_norm(
        x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), eps
    )
    if op.outputs == 1:
        return y
    axes = list(range(axis, x.dim()))
    mean = x.float().mean(axes, keepdim=True)
    spread = (x.float() - mean).square().mean(axes, keepdim=True)
    return y, mean, torch.rsqrt(spread + eps)


@operator("RMSNormalization")
def _rms_norm(op: Operator, x: Tensor, scale: Tensor) -> Tensor:
    shape = x.shape[op.get("axis", -1) % x.dim() :]
    return F.rms_norm(x, shape, scale.expand(shape), op.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(op: Operator, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=op.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(op: Operator, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = op.get("num_groups")
    if op.opset < 21:  # one value a group then
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, op.get("epsilon", 1e-5))


@operator("BatchNormalization")
def _batch_norm(
    op: Operator, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    if op.get("training_mode", 0):
        raise NotImplementedError("BatchNormalization in training")
    return F.batch_norm(x, mean, variance, scale, bias, eps=op.get("epsilon", 1e-5))


@operator("LpNormalization")
def _lp_norm(op: Operator, x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, op.get("p", 2), op.get("axis", -1), keepdim=True)
    return x / norm


@operator("LRN")
def _lrn(op: Operator, x: Tensor) -> Tensor:
    size = op.get("size")
    squares = F.pad(
        x.square().flatten(2).unsqueeze(1),
        (0, 0, math.floor((size - 1) / 2), math.ceil((size - 1) / 2)),
    )
    local = F.avg_pool2d(squares, (size, 1), stride=1).squeeze(1).reshape(x.shape)
    return x / torch.pow(local * op.get("alpha", 1e-4) + op.get("bias", 1.0), op.get("beta", 0.75))
