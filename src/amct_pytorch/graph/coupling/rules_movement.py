"""What functions that only move data do to labels: the function itself, run on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amct_pytorch.graph.coupling.labels import along, compact, varying
from amct_pytorch.graph.coupling.propagation import (
    Propagation,
    name_of,
    operands,
    results_of,
    rule,
)
from amct_pytorch.graph.trace import OpCall, Operand

Results = Sequence[Tensor] | None

_INTO = "view reshape flatten unflatten ravel view_as reshape_as"
_ALONG = """
    permute transpose swapaxes swapdims movedim moveaxis t T mT H mH adjoint squeeze unsqueeze
    split split_with_sizes chunk tensor_split hsplit vsplit unbind narrow select __getitem__
    index_select expand expand_as broadcast_to repeat repeat_interleave tile roll flip fliplr
    flipud rot90 pixel_shuffle pixel_unshuffle channel_shuffle diagonal unfold take_along_dim
    gather meshgrid atleast_1d atleast_2d atleast_3d broadcast_tensors
"""
_JOIN = "cat concat concatenate stack hstack vstack dstack"
# Functions whose results are nothing but entries of their operands.
MOVING = frozenset(f"{_INTO} {_ALONG} {_JOIN}".split()) | {"squeeze_", "unsqueeze_", "t_"}


def run_on_labels(
    flow: Propagation, target: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> list[Tensor] | None:
    """What a function makes of labels; None if it cannot.

    Args:
        flow: knows the labels.
        target: the function.
        args: of the call, with `Operand`s for tensors.
        kwargs: likewise.
    """
    missing = False

    def held(value: Any, first: bool = False) -> Any:
        nonlocal missing
        if isinstance(value, Operand):
            if not first and value.value in flow.trace.integers:
                return flow.trace.integers[value.value].cpu()
            return flow.of(value)
        if isinstance(value, (list, tuple)):
            return type(value)(held(item, first) for item in value)
        if isinstance(value, slice):
            parts = [held(part) for part in (value.start, value.stop, value.step)]
            missing |= any(isinstance(part, Tensor) for part in parts)
            return slice(*parts)
        return value

    # The data comes first; integers behind it are indices.
    given = [held(arg, i == 0) for i, arg in enumerate(args)]
    named = {key: held(value, key in ("input", "tensors")) for key, value in kwargs.items()}
    if missing:
        return None
    try:
        return results_of(target(*given, **named))
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None


def moved(flow: Propagation, op: OpCall) -> list[Tensor] | None:
    """Labels of a call's results."""
    name = name_of(op)
    target = op.target
    # Labels with stride 0 can rarely be viewed, and nothing may happen to them in place.
    if name in ("view", "view_as"):
        target = torch.Tensor.reshape if name == "view" else torch.Tensor.reshape_as
    elif name.endswith("_") and not name.endswith("__"):
        target = getattr(torch.Tensor, name.rstrip("_"))
    assert target is not None
    if any(_unseen_index(flow, operand) for operand in operands([op.args[1:], op.kwargs])):
        return None
    return run_on_labels(flow, target, op.args, op.kwargs)


def _unseen_index(flow: Propagation, operand: Operand) -> bool:
    return operand.value not in flow.trace.integers and operand.value not in flow.labels


@rule(*_INTO.split())
def into_shape(flow: Propagation, op: OpCall) -> Results:
    """An axis is split into several, or several become one."""
    found = moved(flow, op)
    if found is None or len(found) != 1:
        return None
    sizes: Sequence[Any] = op.args[1:] or tuple(op.kwargs.values())
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    # The axis whose size is left open is the one that can shrink.
    open_axes = [axis for axis, size in enumerate(sizes) if size == -1]
    return [flow.apart(op, found[0], open_axes)]


@rule(*_ALONG.split())
def along_axes(flow: Propagation, op: OpCall) -> Results:
    """Axes change places, or parts are taken."""
    found = moved(flow, op)
    if found is None:
        return None
    _balance_parts(flow, op, found)
    # Of a shuffle the channels stay apart, not the pixels.
    prefer = (len(op.shapes[0]) - 3,) if name_of(op) == "pixel_shuffle" else ()
    return [flow.apart(op, labels, prefer) for labels in found]


@rule(*_JOIN.split())
def join(flow: Propagation, op: OpCall) -> Results:
    """Operands one behind the other along an axis, old or new."""
    found = run_on_labels(flow, op.target, op.args, op.kwargs) if op.target else None
    if found is None or len(found) != 1:
        return None
    axis = op.argument(1, "dim")
    axis = (op.kwargs.get("axis", 0) if axis is None else axis) % max(found[0].dim(), 1)
    others = [other for other in range(found[0].dim()) if other != axis]
    return [flow.apart(op, found[0], others)]


def _balance_parts(flow: Propagation, op: OpCall, found: Sequence[Tensor]) -> None:
    """Equal parts of an axis with channels keep equal numbers of them."""
    (x, *_) = operands([op.args, op.kwargs])
    axes = varying(flow.of(x))
    if len(axes) != 1 or found[0].dim() != len(x.shape):
        return
    axis = axes[0]
    sizes = [labels.shape[axis] for labels in found]
    whole = x.shape[axis]
    same = name_of(op) in ("chunk", "split", "tensor_split", "narrow", "__getitem__")
    if same and sizes[0] < whole and len(set(sizes)) == 1 and whole % sizes[0] == 0:
        part = compact(found[0], flow.sets)
        channels = flow.vector(x, axis, op)
        pieces = channels.reshape(-1, sizes[0])
        taken = flow.sets.roots(part.movedim(axis, 0).reshape(sizes[0], -1)[:, 0].numpy())
        if any((flow.sets.roots(piece) == taken).all() for piece in pieces):
            flow.balance(channels, len(pieces), op)


@rule("pad")
def pad(flow: Propagation, op: OpCall) -> Results:
    """Entries on the rim take the labels of what they stand beside."""
    x, amounts = op.argument(0, "input"), op.argument(1, "pad")
    mode = op.argument(2, "mode") or "constant"
    if not isinstance(x, Operand) or not all(isinstance(n, int) for n in amounts):
        return None
    labels = compact(flow.of(x), flow.sets)
    changing = varying(labels)
    rank = labels.dim()
    padded = {rank - 1 - i // 2 for i, n in enumerate(amounts) if n}
    if not padded.isdisjoint(changing):
        if mode != "constant":
            return None
        kept = [n if rank - 1 - i // 2 in changing else 0 for i, n in enumerate(amounts)]
        for axis in range(rank):
            if axis not in changing and labels.shape[axis] > 1:
                labels = labels.narrow(axis, 0, 1)
        labels = F.pad(labels, kept)
    elif changing:
        if len(changing) > 1:
            return None
        return [along(flow.vector(x, changing[0], op), changing[0], op.shapes[0])]
    else:
        labels = labels.narrow(0, 0, 1) if rank else labels
        for axis in range(rank):
            labels = labels.narrow(axis, 0, 1)
    return [labels.expand(op.shapes[0])]


_POOLS = [
    f"{kind}_pool{n}d{suffix}"
    for n in (1, 2, 3)
    for kind, suffix in (
        ("max", ""),
        ("max", "_with_indices"),
        ("avg", ""),
        ("lp", ""),
        ("adaptive_max", ""),
        ("adaptive_max", "_with_indices"),
        ("adaptive_avg", ""),
    )
]


@rule(*_POOLS, "interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "grid_sample")
def spatial(flow: Propagation, op: OpCall) -> Results:
    """Each channel by itself, over space."""
    x = op.argument(0, "input")
    if not isinstance(x, Operand):
        return None
    name = name_of(op)
    digits = [int(c) for c in name if c.isdigit()]
    axis = -digits[0] - 1 if digits else 1 - len(x.shape)
    if any(flow.of(other).any() for other in operands([op.args[1:], op.kwargs])):
        return None
    channels = flow.vector(x, axis, op)
    return [along(channels, axis, shape) for shape in op.shapes]
