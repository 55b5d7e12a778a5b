"""What functions that work on each entry by itself do to labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_pytorch.graph.coupling.labels import (
    all_of,
    carried,
    compact,
    stays,
    varying,
)
from amct_pytorch.graph.coupling.propagation import Propagation, operands, place, rule
from amct_pytorch.graph.trace import OpCall, Operand

Results = Sequence[Tensor] | None

# The names with "_" behind them, which work in place, go with these. All of them compute with every
# number that they are given.
ONE = """
    relu relu6 hardtanh leaky_relu rrelu elu selu celu gelu silu mish sigmoid hardsigmoid
    logsigmoid tanh hardswish softplus softsign tanhshrink hardshrink softshrink threshold exp
    exp2 expm1 log log2 log10 log1p sqrt rsqrt square abs absolute neg negative positive sign sin
    cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv reciprocal round floor ceil
    trunc frac logit clip isnan isinf isfinite logical_not bitwise_not nan_to_num
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    to type float half double bfloat16 int long bool cpu cuda type_as
    contiguous clone detach data real requires_grad
    zeros_like ones_like empty_like rand_like randn_like full_like fill zero
    __neg__ __pos__ __abs__ __invert__ bernoulli
"""
SEVERAL = """
    add sub subtract rsub mul multiply div divide true_divide floor_divide pow float_power
    maximum minimum fmax fmin fmod remainder atan2 hypot where addcmul addcdiv lerp copysign
    clamp clamp_min clamp_max masked_fill copy xlogy logaddexp
    eq ne lt le gt ge not_equal less less_equal greater greater_equal
    logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__
    __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __floordiv__ __rfloordiv__ __pow__
    __rpow__ __ipow__ __mod__ __rmod__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __rand__
    __iand__ __or__ __ror__ __ior__ __xor__ __rxor__ __ixor__
"""


@rule(*ONE.split())
def one(flow: Propagation, op: OpCall) -> Results:
    """Of the first operand's entries, one each."""
    found = operands([op.args, op.kwargs])
    if not found or found[0].shape != op.shapes[0] or len(op.shapes) != 1:
        return None
    return [flow.of(found[0])]


@rule(*SEVERAL.split())
def several(flow: Propagation, op: OpCall) -> Results:
    """Of entries of several operands, broadcast: they go together."""
    if len(op.shapes) != 1:
        return None
    return [elementwise(flow, op, operands([op.args, op.kwargs]), op.shapes[0])]


def elementwise(
    flow: Propagation, op: OpCall, found: Sequence[Operand], shape: tuple[int, ...]
) -> Tensor:
    """The labels of operands broadcast to a shape and tied."""
    given = [(operand, flow.of(operand)) for operand in found]
    spread = [(padded(operand, shape), labels.expand(shape)) for operand, labels in given]
    spread = [(own, compact(labels, flow.sets)) for own, labels in spread]
    axes = {axis for _, labels in spread for axis in varying(labels)}
    aligned = []
    for own, labels in spread:
        if all(own[axis] == shape[axis] for axis in axes):
            aligned.append(labels)
        elif carried(labels):
            flow.freeze(labels, f"it is spread over channels of something else by {place(op)}")
    if not axes:
        # No channels to tell apart here: what has one label keeps it.
        aligned = [labels for labels in aligned if carried(labels)] or [stays(shape)]
    first, *others = aligned
    for labels in others:
        if carried(first) or carried(labels):
            small = torch.broadcast_tensors(_thin(first), _thin(labels))
            reason = f"{place(op)} joins it with what stays"
            flow.sets.tie(all_of(small[0].contiguous()), all_of(small[1].contiguous()), reason)
    kept = [labels for labels in aligned if carried(labels)]
    return compact(kept[0] if kept else first, flow.sets)


def padded(operand: Operand, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The operand's sizes, with ones before them for the axes it lacks."""
    return (1,) * (len(shape) - len(operand.shape)) + operand.shape


def _thin(labels: Tensor) -> Tensor:
    """One entry along each axis on which the labels do not change."""
    for axis in range(labels.dim()):
        if labels.shape[axis] > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


@rule("__setitem__")
def set_item(flow: Propagation, op: OpCall) -> Results:
    """Entries of the first operand are replaced by those of the last."""
    target, index, value = op.args
    if not isinstance(target, Operand):
        return None
    labels = flow.of(target)
    if isinstance(value, Operand):
        from amct_pytorch.graph.coupling.rules_movement import run_on_labels

        replaced = run_on_labels(flow, torch.Tensor.__getitem__, (target, index), {})
        if replaced is None:
            return None
        (part,) = replaced
        other = flow.of(value)
        if carried(part) or carried(other):
            reason = f"{place(op)} joins it with what stays"
            spread = other.expand(part.shape)
            flow.sets.tie(part.reshape(-1).numpy(), spread.reshape(-1).contiguous().numpy(), reason)
    return [compact(labels, flow.sets)]
