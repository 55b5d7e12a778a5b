"""Rounding of weights that gradients pass straight through (STE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat

# Weights worked on at a time.
PART = 2**17


def straight_through(weight: Tensor, scale: Tensor, number_format: IntFormat) -> Tensor:
    """`weight` rounded to multiples of `scale`; its gradient is that of the result.

    Args:
        weight: floating, any shape.
        scale: positive, broadcastable to it; gets no gradient.
        number_format: the integers.
    """
    result: Tensor = _StraightThrough.apply(weight, scale, number_format.bits)
    return result


def learned_scale(weight: Tensor, scale: Tensor, number_format: IntFormat) -> Tensor:
    """As `straight_through`, with a gradient of the scale too (LSQ, arXiv 1902.08153, eq. 3).

    With u = weight / scale: d / d weight is 1 where qmin <= u <= qmax, else 0;
    d / d scale is round(u) - u there, and qmin or qmax beyond.
    """
    result: Tensor = _LearnedScale.apply(weight, scale, number_format.bits)
    return result


def _rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return IntFormat(bits).quantize(weight, scale).mul_(scale).to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        return _rounded(weight, scale, bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return _rounded(weight, scale, bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grid = IntFormat(ctx.bits)
        grad_weight = torch.empty_like(weight)
        sums = []
        for part in _parts(weight):
            own = scale if scale.shape[0] == 1 else scale[part]
            steps = weight[part] / own
            inside = (steps >= grid.qmin) & (steps <= grid.qmax)
            torch.mul(grad[part], inside, out=grad_weight[part])
            share = torch.round(steps).clamp_(grid.qmin, grid.qmax)
            share.sub_(steps.mul_(inside)).mul_(grad[part])
            sums.append(share.sum_to_size(own.shape))
        by_scale = torch.cat(sums) if scale.shape[0] > 1 else torch.stack(sums).sum(0)
        return grad_weight, by_scale.to(scale.dtype), None


def _parts(weight: Tensor) -> list[slice]:
    """Rows of a weight, some at a time: what they need in between is small then."""
    rows = weight.shape[0]
    step = max(1, PART * rows // max(1, weight.numel()))
    if torch.compiler.is_compiling():  # a compiler sees to that
        step = rows
    return [slice(first, first + step) for first in range(0, rows, step)]
