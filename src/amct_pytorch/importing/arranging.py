"""Operators that move elements about: shapes, slices, gathering, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from amct_pytorch.importing.registry import Operator, operator
from amct_pytorch.importing.values import Value, host, host_array, integers, scalar, tensor


@operator("Shape")
def _shape(op: Operator, x: Tensor) -> np.ndarray:
    return host_array(list(x.shape[op.get("start", 0) : op.get("end")]))


@operator("Size")
def _size(_: Operator, x: Tensor) -> np.ndarray:
    return host_array(x.numel())


def _target(x: Any, shape: Value, allowzero: int) -> list[Any]:
    wanted = integers(shape)
    if allowzero:
        return wanted
    # A size that is no Python number is computed from other sizes, never the 0 that stands for
    # "as it is"; comparing it would fix it to the example's.
    return [
        x.shape[i] if isinstance(size, int) and size == 0 else size for i, size in enumerate(wanted)
    ]


def _host_reshape(op: Operator, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return x.reshape(_target(x, shape, op.get("allowzero", 0)))


@operator("Reshape", host_inputs=(1,), on_host=_host_reshape)
def _reshape(op: Operator, x: Tensor, shape: Value) -> Tensor:
    return x.reshape(_target(x, shape, op.get("allowzero", 0)))


@operator("Flatten")
def _flatten(op: Operator, x: Tensor) -> Tensor:
    axis = op.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    rows = 1
    for size in x.shape[:axis]:
        rows = rows * size
    return x.reshape(rows, -1)


def _host_transpose(op: Operator, x: np.ndarray) -> np.ndarray:
    return np.transpose(x, op.get("perm"))


@operator("Transpose", on_host=_host_transpose)
def _transpose(op: Operator, x: Tensor) -> Tensor:
    return x.permute(op.get("perm") or list(range(x.dim()))[::-1])


def _axes(op: Operator, axes: Value) -> list[int] | None:
    found = op.get("axes") if axes is None else integers(axes)
    return None if found is None else list(found)


def _host_squeeze(op: Operator, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    found = _axes(op, axes)
    return np.squeeze(x, None if found is None else tuple(found))


@operator("Squeeze", host_inputs=(1,), on_host=_host_squeeze)
def _squeeze(op: Operator, x: Tensor, axes: Value = None) -> Tensor:
    found = _axes(op, axes)
    return x.squeeze() if found is None else x.squeeze(tuple(found))


def _host_unsqueeze(op: Operator, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.expand_dims(x, tuple(_axes(op, axes) or ()))


@operator("Unsqueeze", host_inputs=(1,), on_host=_host_unsqueeze)
def _unsqueeze(op: Operator, x: Tensor, axes: Value = None) -> Tensor:
    found = _axes(op, axes) or []
    rank = x.dim() + len(found)
    for axis in sorted(axis % rank for axis in found):
        x = x.unsqueeze(axis)
    return x


def _host_concat(op: Operator, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, op.get("axis", 0))


@operator("Concat", on_host=_host_concat)
def _concat(op: Operator, *parts: Tensor) -> Tensor:
    return torch.cat(parts, op.get("axis"))


@operator("Split", host_inputs=(1,))
def _split(op: Operator, x: Tensor, split: Value = None) -> tuple[Tensor, ...]:
    axis = op.get("axis", 0)
    sizes = op.get("split") if split is None else integers(split)
    if sizes is None:
        each = -(-x.shape[axis] // op.get("num_outputs", op.outputs))
        return tuple(torch.split(x, each, axis))
    return tuple(torch.split(x, list(sizes), axis))


def _slices(
    op: Operator, rank: int, starts: Value, ends: Value, axes: Value, steps: Value
) -> list[tuple[int, Any, Any, int]]:
    """(axis, start, end, step) for each axis that is cut."""
    first = op.get("starts") if starts is None else integers(starts)
    last = op.get("ends") if ends is None else integers(ends)
    along = op.get("axes") if axes is None else integers(axes)
    along = range(len(first)) if along is None else along
    by = [1] * len(first) if steps is None else integers(steps)
    return [(axis % rank, *rest) for axis, *rest in zip(along, first, last, by, strict=True)]


def _host_slice(
    op: Operator,
    x: np.ndarray,
    starts: Value = None,
    ends: Value = None,
    axes: Value = None,
    steps: Value = None,
) -> np.ndarray:
    index = [slice(None)] * x.ndim
    for axis, start, end, step in _slices(op, x.ndim, starts, ends, axes, steps):
        index[axis] = slice(start, None if step < 0 and end < -x.shape[axis] else end, step)
    return x[tuple(index)]


@operator("Slice", host_inputs=(1, 2, 3, 4), on_host=_host_slice)
def _slice(
    op: Operator,
    x: Tensor,
    starts: Value = None,
    ends: Value = None,
    axes: Value = None,
    steps: Value = None,
) -> Tensor:
    index = [slice(None)] * x.dim()
    for axis, start, end, step in _slices(op, x.dim(), starts, ends, axes, steps):
        if step > 0:
            index[axis] = slice(start, end, None if step == 1 else step)
            continue
        # torch has no negative steps: turned round, counted from the other end.
        x = x.flip(axis)
        size = x.shape[axis]
        ahead = [_from_other_end(value, size) for value in (start, end)]
        index[axis] = slice(ahead[0], ahead[1], -step)
    return x[tuple(index)]


def _from_other_end(position: int, size: int) -> int:
    from_start = position + size if position < 0 else position
    return size - 1 - max(-1, min(from_start, size - 1))


def _host_gather(op: Operator, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.asarray(np.take(x, indices.astype(np.int64), axis=op.get("axis", 0)))


@operator("Gather", on_host=_host_gather)
def _gather(op: Operator, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0) % x.dim()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if indices.dim() == 0:
        return x.index_select(axis, indices.reshape(1)).squeeze(axis)
    found = x.index_select(axis, indices.reshape(-1).long())
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def _gather_elements(op: Operator, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0) % x.dim()
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


@operator("GatherND")
def _gather_nd(op: Operator, x: Tensor, indices: Tensor) -> Tensor:
    batch = op.get("batch_dims", 0)
    if batch:
        shape = [*x.shape[:batch]]
        own = [
            torch.arange(size).view([-1 if i == axis else 1 for i in range(indices.dim() - 1)])
            for axis, size in enumerate(shape)
        ]
        places = [place.expand(indices.shape[:-1]) for place in own]
        return x[tuple(places) + tuple(indices.unbind(-1))]
    return x[tuple(indices.unbind(-1))]


@operator("ScatterND")
def _scatter_nd(op: Operator, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    reduction = op.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise NotImplementedError(f"reduction {reduction!r}")
    return x.index_put(tuple(indices.unbind(-1)), updates, accumulate=reduction == "add")


@operator("ScatterElements")
def _scatter_elements(op: Operator, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = op.get("axis", 0) % x.dim(), op.get("reduction", "none")
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, indices, updates, names[reduction])


@operator("Expand", host_inputs=(1,))
def _expand(_: Operator, x: Tensor, shape: Value) -> Tensor:
    wanted = integers(shape)
    own = [1] * (len(wanted) - x.dim()) + list(x.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    # A 1 in the shape asks for nothing.
    sizes = [
        mine if isinstance(size, int) and size == 1 else size
        for mine, size in zip(own, wanted, strict=True)
    ]
    return x.expand(sizes)


@operator("Tile", host_inputs=(1,))
def _tile(_: Operator, x: Tensor, repeats: Value) -> Tensor:
    return x.repeat(integers(repeats))


def _host_constant_of_shape(op: Operator, shape: np.ndarray) -> Any:
    value = op.get("value")
    fill = np.zeros(1, np.float32) if value is None else value
    if fill.dtype != np.int64 or shape.dtype == object:
        return NotImplemented
    return np.full(integers(shape), fill.reshape(-1)[0])


@operator("ConstantOfShape", host_inputs=(0,), on_host=_host_constant_of_shape)
def _constant_of_shape(op: Operator, shape: Value) -> Tensor:
    value = op.get("value")
    fill = np.zeros(1, np.float32) if value is None else value
    return torch.full(integers(shape), fill.reshape(-1)[0].item(), dtype=tensor(fill).dtype)


@operator("OneHot", host_inputs=(1, 2))
def _one_hot(op: Operator, indices: Tensor, depth: Value, values: Value) -> Tensor:
    number, axis = int(scalar(depth)), op.get("axis", -1)
    off, on = tensor(values).unbind()
    hot = F.one_hot(torch.remainder(indices.long(), number), number).bool()
    result = torch.where(hot, on, off)
    return result if axis in (-1, indices.dim()) else result.movedim(-1, axis)


@operator("Trilu", host_inputs=(1,))
def _trilu(op: Operator, x: Tensor, k: Value = None) -> Tensor:
    diagonal = 0 if k is None else int(scalar(k))
    return torch.triu(x, diagonal) if op.get("upper", 1) else torch.tril(x, diagonal)


@operator("NonZero")
def _nonzero(_: Operator, x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


@operator("DepthToSpace")
def _depth_to_space(op: Operator, x: Tensor) -> Tensor:
    size = op.get("blocksize")
    if op.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    y = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // size**2, h * size, w * size)


@operator("SpaceToDepth")
def _space_to_depth(op: Operator, x: Tensor) -> Tensor:
    if op.get("mode", "DCR") != "DCR":
        raise NotImplementedError(f"SpaceToDepth with mode {op.get('mode')}")
    size = op.get("blocksize")
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * size**2, h // size, w // size)


@operator("Pad", host_inputs=(1, 2, 3))
def _pad(
    op: Operator, x: Tensor, pads: Value = None, fill: Value = None, axes: Value = None
) -> Tensor:
    amounts = op.get("pads") if pads is None else integers(pads)
    half = len(amounts) // 2
    along = range(x.dim()) if axes is None else integers(axes)
    begin, end = [0] * x.dim(), [0] * x.dim()
    for i, axis in enumerate(along):
        begin[axis % x.dim()], end[axis % x.dim()] = amounts[i], amounts[half + i]
    flat = [n for pair in zip(begin[::-1], end[::-1], strict=True) for n in pair]
    mode = op.get("mode", "constant")
    if mode == "constant":
        value = op.get("value", 0.0) if fill is None else host(fill).reshape(-1)[0].item()
        return F.pad(x, flat, value=value)
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    # torch pads so only the last axes.
    while len(flat) > 2 and flat[-2:] == [0, 0] and len(flat) // 2 > x.dim() - 2:
        flat = flat[:-2]
    return F.pad(x, flat, mode=names[mode])
