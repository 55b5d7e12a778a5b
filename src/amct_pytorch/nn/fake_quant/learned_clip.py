"""ULQ: fake quantization whose clip values are learned (a quantizer of the LSQ+ family).

After Bhalgat et al., arXiv 2004.09576, with the clip values as parameters. With u = x / s,
n = 2^b - 1 and lo, hi the ends that the integers reach, x^ = clip(round(u)) * s has

    d x^ / d x        = 1 inside, 0 beyond the ends
    d x^ / d clip_max = 1 above hi, 0 below lo,   (round(u) - u) / n inside
    d x^ / d clip_min = 0 above hi, 1 below lo, - (round(u) - u) / n inside

Without an offset there is one clip value c = m * s with m = 2^(b-1) - 1, and

    d x^ / d c = 1 above hi, -2^(b-1) / m below lo, (round(u) - u) / m inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_float
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat

# Values worked on at a time, in scratch memory that stays in the processor's cache.
CHUNK = 2**16


def learned_clip(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    number_format: IntFormat,
    scale: float | Tensor,
    offset: int | Tensor,
    *,
    symmetric: bool = False,
    fixed_min: bool = False,
) -> Tensor:
    """`x` quantized and dequantized, in its dtype, with the gradients of ULQ.

    The numbers are those of the deploy model: x is multiplied by the inverse of the scale,
    and rounded half to even. Half precision is computed in float32. The backward pass needs
    nothing but `x`.

    Args:
        x: floating, any shape.
        clip_max: gets a gradient; what the factors were computed from.
        clip_min: gets a gradient; zero where `symmetric` or `fixed_min`.
        number_format: the integers.
        scale: factor; a plain float32 number is for tensors on the CPU and many times faster.
        offset: factor, of the same kind.
        symmetric: whether the range is given by `clip_max` alone.
        fixed_min: whether the range begins at 0, whatever `clip_min` is.
    """
    result: Tensor = _LearnedClip.apply(
        x, clip_max, clip_min, number_format.bits, scale, offset, symmetric, fixed_min
    )
    return result


def observed_only(x: Tensor, clip_max: Tensor, clip_min: Tensor) -> Tensor:
    """`x` as it is; the clip values take part, with zero gradients.

    DistributedDataParallel waits for a gradient of every parameter.
    """
    result: Tensor = _ObservedOnly.apply(x, clip_max, clip_min)
    return result


class _ObservedOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor) -> Tensor:
        ctx.like = clip_max.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zero = torch.zeros_like(ctx.like)
        return grad, zero, zero.clone()


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        clip_max: Tensor,
        clip_min: Tensor,
        bits: int,
        scale: float | Tensor,
        offset: int | Tensor,
        symmetric: bool,
        fixed_min: bool,
    ) -> Tensor:
        ctx.bits, ctx.symmetric, ctx.fixed_min = bits, symmetric, fixed_min
        ctx.dtype = clip_max.dtype
        ctx.plain = not isinstance(scale, Tensor)
        if isinstance(scale, Tensor) or isinstance(offset, Tensor):
            assert isinstance(scale, Tensor) and isinstance(offset, Tensor)
            ctx.save_for_backward(x, scale, offset)
            return _quantized(x, bits, scale, offset)
        ctx.scale, ctx.offset = scale, offset
        x = _dense(x)
        ctx.save_for_backward(x)
        return _quantized_in_chunks(x, bits, scale, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        if ctx.plain:
            (x,) = ctx.saved_tensors
            needed = wanted[0], wanted[1] or wanted[2], ctx.symmetric or not ctx.fixed_min
            grad_x, above, below, error = _sums_in_chunks(
                grad, x, ctx.bits, ctx.scale, ctx.offset, needed
            )
        else:
            x, scale, offset = ctx.saved_tensors
            grad_x, above, below, error = _sums(grad, x, ctx.bits, scale, offset)
        grids = IntFormat(ctx.bits)
        if ctx.symmetric:
            for_max = above + (grids.qmin * below + error) / grids.qmax
            for_min = torch.zeros_like(for_max)
        else:
            share = error / (grids.qmax - grids.qmin)
            for_max, for_min = above + share, below - share
            if ctx.fixed_min:
                for_min = torch.zeros_like(for_max)
        return (
            grad_x if wanted[0] else None,
            for_max.to(ctx.dtype) if wanted[1] else None,
            for_min.to(ctx.dtype) if wanted[2] else None,
            *(None,) * 5,
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _quantized(x: Tensor, bits: int, scale: Tensor, offset: Tensor) -> Tensor:
    grid, wide = IntFormat(bits), _wide(x)
    scale = scale.to(wide.dtype)
    steps = torch.round(wide * scale.reciprocal())
    steps = torch.minimum(torch.maximum(steps, grid.qmin - offset), grid.qmax - offset)
    return (steps * scale).to(x.dtype)


def _sums(
    grad: Tensor, x: Tensor, bits: int, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of x, and the sums of `grad` above and below the range and times the error."""
    grid, wide, g = IntFormat(bits), _wide(x), _wide(grad)
    scale = scale.to(wide.dtype)
    low, high = (grid.qmin - offset) * scale, (grid.qmax - offset) * scale
    is_above, is_below = wide > high, wide < low
    zero = torch.zeros_like(g)
    steps = torch.minimum(torch.maximum(wide, low), high) * scale.reciprocal()
    return (
        torch.where(is_above | is_below, torch.zeros_like(grad), grad),
        torch.where(is_above, g, zero).sum(),
        torch.where(is_below, g, zero).sum(),
        (g * (torch.round(steps) - steps)).sum(),
    )


def _dense(x: Tensor) -> Tensor:
    """`x` with nothing between its values in memory, for `_flat`."""
    return x if _order(x) is not None else x.contiguous()


def _order(x: Tensor) -> tuple[int, ...] | None:
    """The axes from the outermost to the innermost in memory; None if there are gaps."""
    if x.is_contiguous():
        return tuple(range(x.dim()))
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return (0, 2, 3, 1)
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return (0, 2, 3, 4, 1)
    return None


def _flat(x: Tensor) -> Tensor:
    order = _order(x)
    assert order is not None
    return x.permute(order).view(-1)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Dense tensors of one layout in memory, some values at a time."""
    return zip(*(_flat(tensor).split(CHUNK) for tensor in tensors), strict=True)


def _quantized_in_chunks(x: Tensor, bits: int, scale: float, offset: int) -> Tensor:
    grid = IntFormat(bits)
    inverse = c_float(1 / scale).value
    low, high = grid.qmin - offset, grid.qmax - offset
    y = torch.empty_like(x)
    for source, target in _pieces(x, y):
        if x.dtype == torch.float32:
            torch.mul(source, inverse, out=target).round_().clamp_(low, high).mul_(scale)
        else:
            steps = source.float().mul_(inverse).round_().clamp_(low, high)
            target.copy_(steps.mul_(scale))
    return y


def _sums_in_chunks(
    grad: Tensor, x: Tensor, bits: int, scale: float, offset: int, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """See `_sums`; the sums are of float32 pieces in float64, `needed` says whether the gradient
    of x, any of the sums, and that below are."""
    grid = IntFormat(bits)
    inverse = c_float(1 / scale).value
    low, high = (c_float((end - offset) * scale).value for end in (grid.qmin, grid.qmax))
    # hardtanh's gradient excludes the ends; here they are inside, as for torch.clamp.
    outside = _next(low, -np.inf), _next(high, np.inf)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    grad_x = torch.empty_like(grad)
    clipped = torch.empty(min(CHUNK, x.numel()), dtype=torch.float32)
    scratch = torch.empty_like(clipped)
    above = below = error = 0.0
    for part, g_part, target in _pieces(x, grad, grad_x):
        values, g = part.float(), g_part.float()
        a, b = clipped[: values.numel()], scratch[: values.numel()]
        if needed[0]:
            if grad.dtype == torch.float32:
                torch.ops.aten.hardtanh_backward.grad_input(g, values, *outside, grad_input=target)
            else:
                target.copy_(torch.ops.aten.hardtanh_backward(g, values, *outside))
        if not needed[1]:
            continue
        torch.clamp(values, low, high, out=a).mul_(inverse)
        error += float(torch.dot(g, torch.round(a, out=b).sub_(a)))
        above += float(torch.dot(g, torch.gt(values, high, out=b)))
        if needed[2]:
            below += float(torch.dot(g, torch.lt(values, low, out=b)))
    above_sum, below_sum, error_sum = torch.tensor([above, below, error], dtype=torch.float64)
    return grad_x if needed[0] else None, above_sum, below_sum, error_sum


def _next(value: float, towards: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(towards)))
