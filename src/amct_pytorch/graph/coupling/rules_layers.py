"""What layers with weights do to labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from amct_pytorch.graph.coupling.labels import along, carried, stays, varying
from amct_pytorch.graph.coupling.propagation import Propagation, place, rule
from amct_pytorch.graph.coupling.slots import Role
from amct_pytorch.graph.trace import OpCall, Operand

Results = Sequence[Tensor] | None


@rule("conv1d", "conv2d", "conv3d")
def convolution(flow: Propagation, op: OpCall) -> Results:
    """Weight [out, in / groups, *kernel]."""
    return _convolution(flow, op, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(flow: Propagation, op: OpCall) -> Results:
    """Weight [in, out / groups, *kernel]."""
    return _convolution(flow, op, transposed=True)


def _convolution(flow: Propagation, op: OpCall, *, transposed: bool) -> Results:
    x, weight, bias = (op.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
    groups = op.argument(6, "groups") or 1
    if not isinstance(x, Operand) or not isinstance(weight, Operand):
        return None
    reason = flow.whose(weight)
    if reason is not None:
        return flow.leave(op, f"it goes into {place(op)}: {reason}")
    axis = 1 - len(weight.shape)  # from behind: inputs without a batch axis are allowed
    kind = "ConvTranspose" if transposed else "Conv"
    taken = flow.vector(x, axis, op)
    number = op.shapes[0][axis]
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    if 1 < groups == len(taken):  # depthwise: channels only pass through
        made = np.repeat(taken, number // groups)
        flow.slot(op, weight, 0, taken if transposed else made, Role.FOLLOWS, kind)
    else:
        made = flow.sets.new(number)
        flow.balance(taken, groups, op)
        flow.balance(made, groups, op)
        flow.slot(op, weight, in_axis, taken, Role.TAKES, kind, 1 if transposed else groups)
        flow.slot(op, weight, out_axis, made, Role.MAKES, kind, groups if transposed else 1)
    flow.slot(op, bias, 0, made, Role.FOLLOWS, kind)
    return [along(made, axis, op.shapes[0])]


@rule("linear")
def linear(flow: Propagation, op: OpCall) -> Results:
    """Weight [out, in], along the last axis of the input."""
    x, weight, bias = (op.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
    if not isinstance(x, Operand) or not isinstance(weight, Operand):
        return None
    reason = flow.whose(weight)
    if reason is not None:
        return flow.leave(op, f"it goes into {place(op)}: {reason}")
    kind = "Gemm" if len(x.shape) == 2 else "MatMul"
    others = [axis for axis in varying(flow.of(x)) if axis != len(x.shape) - 1]
    if others and len(varying(flow.of(x))) == 1:
        # It works along another axis than the channels', which pass through.
        channels = flow.vector(x, others[0], op)
        return [along(channels, others[0], op.shapes[0])]
    taken = flow.vector(x, -1, op)
    made = flow.sets.new(op.shapes[0][-1])
    flow.slot(op, weight, 1, taken, Role.TAKES, kind)
    flow.slot(op, weight, 0, made, Role.MAKES, kind)
    flow.slot(op, bias, 0, made, Role.FOLLOWS, kind)
    return [along(made, -1, op.shapes[0])]


@rule("embedding")
def embedding(flow: Propagation, op: OpCall) -> Results:
    """Weight [words, channels]."""
    weight = op.argument(1, "weight")
    reason = flow.whose(weight)
    if reason is not None:
        return [stays(op.shapes[0])]
    made = flow.sets.new(op.shapes[0][-1])
    flow.slot(op, weight, 1, made, Role.FOLLOWS, "Gather")
    return [along(made, -1, op.shapes[0])]


@rule("batch_norm")
def batch_norm(flow: Propagation, op: OpCall) -> Results:
    """Four vectors of one value for each channel."""
    return _by_channel(flow, op, "BatchNormalization", 1, 5)


@rule("instance_norm")
def instance_norm(flow: Propagation, op: OpCall) -> Results:
    """Up to four vectors of one value for each channel."""
    return _by_channel(flow, op, "InstanceNormalization", 1, 5)


@rule("group_norm")
def group_norm(flow: Propagation, op: OpCall) -> Results:
    """Statistics over the channels of a group, which keep equal numbers."""
    x, groups = op.argument(0, "input"), op.argument(1, "num_groups")
    if not isinstance(x, Operand) or not isinstance(groups, int):
        return None
    if groups < x.shape[1]:
        flow.balance(flow.vector(x, 1, op), groups, op)
    return _by_channel(flow, op, "GroupNormalization", 2, 4)


@rule("prelu")
def prelu(flow: Propagation, op: OpCall) -> Results:
    """One slope for each channel, or one for all."""
    weight = op.argument(1, "weight")
    if isinstance(weight, Operand) and np.prod(weight.shape) == 1:
        x = op.argument(0, "input")
        return [flow.of(x)] if isinstance(x, Operand) else None
    return _by_channel(flow, op, "PRelu", 1, 2)


NAMES = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "prelu": ("input", "weight"),
}


def _by_channel(flow: Propagation, op: OpCall, kind: str, first: int, end: int) -> Results:
    """A function whose arguments from `first` to `end` have one value for each channel."""
    names = NAMES[op.function]
    x = op.argument(0, "input")
    if not isinstance(x, Operand):
        return None
    given = [op.argument(i, names[i]) for i in range(first, end)]
    weights = [operand for operand in given if isinstance(operand, Operand)]
    reasons = [reason for reason in map(flow.whose, weights) if reason is not None]
    if reasons and carried(flow.of(x)):
        return flow.leave(op, f"it goes into {place(op)}: {reasons[0]}")
    axis = 1 if len(x.shape) > 1 else 0
    channels = flow.vector(x, axis, op)
    for weight in weights:
        flow.slot(op, weight, 0, channels, Role.FOLLOWS, kind)
    if not weights:
        flow.follower(op, channels, kind)
    return [along(channels, axis, op.shapes[0])]


@rule("layer_norm", "rms_norm")
def layer_norm(flow: Propagation, op: OpCall) -> Results:
    """Statistics over the last axes, and up to two weights of their shape."""
    x, shape = op.argument(0, "input"), op.argument(1, "normalized_shape")
    if not isinstance(x, Operand) or not isinstance(shape, (list, tuple)):
        return None
    kind = "LayerNormalization" if op.function == "layer_norm" else "RMSNormalization"
    given = [op.argument(2, "weight"), op.argument(3, "bias")]
    weights = [operand for operand in given if isinstance(operand, Operand)]
    reasons = [reason for reason in map(flow.whose, weights) if reason is not None]
    axes = varying(flow.of(x))
    if not axes:
        return [flow.of(x)]
    if reasons or len(axes) > 1:
        return flow.leave(op, f"it goes into {place(op)}: {(reasons or ['mixed axes'])[0]}")
    inner = axes[0] - (len(x.shape) - len(shape))
    if inner >= 0:
        channels = flow.vector(x, axes[0], op)
        for weight in weights:
            flow.slot(op, weight, inner, channels, Role.FOLLOWS, kind)
        if not weights:
            flow.follower(op, channels, kind)
    return [flow.of(x)]
