"""Rounding a unit's weights so that errors of one weight are taken up by the others.

For outputs that are read as they are, the error of a rounded weight is a quadratic form of its
differences, with the second moments of the inputs; minimising it is what GPTQ and coordinate
descent do (see `gptq`, `coordinate_descent`). An activation lets only some differences through:
where a channel has inputs of its own (depthwise convolutions), its rows are weighted by the
squared slope of f, otherwise they count alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.algorithms.gptq import GptqSettings, solve_gptq
from amct_pytorch.algorithms.unit import Unit
from amct_pytorch.formats import Granularity, IntFormat

# Groups of up to this many weights of a channel are solved all at once, column by column.
SMALL = 64
SWEEPS = 4
# Of the slopes: rows that f does not let through count a little.
LEAST_SLOPE = 1e-3
# Keeps moments positive definite, as a part of their mean diagonal.
DAMPING = 1e-6


def round_with_feedback(
    unit: Unit, fmt: IntFormat, shrinks: tuple[float, ...], *, one_scale: bool
) -> tuple[Tensor, Tensor]:
    """Scales and rounded weights.

    Args:
        unit: the layer and its data.
        fmt: the integers to round to.
        shrinks: parts of a channel's range that are tried as its range.
        one_scale: whether all channels share one scale.

    Returns:
        Scale [channels] or [1]; steps, integers in float32, [groups, K, channels of a group].
    """
    moments = _moments(unit)
    groups, size, _ = unit.weight.shape
    if groups > 1 and size <= SMALL:
        return _all_at_once(unit.weight, moments, fmt, shrinks, one_scale=one_scale)
    settings = GptqSettings(sweeps=3)
    granularity = Granularity("tensor" if one_scale else "channel")
    if one_scale and len(moments) > 1:
        # One scale over several groups: as for the layer of their mean moments.
        moments = moments.mean(0, keepdim=True).expand_as(moments)
    solved = [
        solve_gptq(weight.T, hessian, fmt, granularity, settings=settings)
        for weight, hessian in zip(unit.weight, moments, strict=True)
    ]
    scales = torch.cat([result.scale.flatten() for result in solved])
    steps = torch.stack([result.codes.T.float() for result in solved])
    if one_scale and len(solved) > 1:
        scale = scales.amax().reshape(1)
        return scale, unit.nearest(scale, fmt)
    return scales, steps


def _moments(unit: Unit) -> Tensor:
    """Second moments of the inputs around their mean, with the ridge, [groups, K, K]."""
    weights = None
    if unit.slopes is not None and unit.weight.shape[2] == 1:
        weights = unit.slopes.T[:, :, None] + LEAST_SLOPE
        weights = weights / weights.mean(1, keepdim=True)
    x = unit.inputs
    weighted = x if weights is None else x * weights
    x = x - weighted.mean(1, keepdim=True)
    weighted = x if weights is None else x * weights
    moments = weighted.transpose(1, 2) @ x / x.shape[1]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + unit.ridge_share).add_(DAMPING * diagonal.mean(1, keepdim=True) + 1e-20)
    return moments


def _all_at_once(
    weight: Tensor,
    moments: Tensor,
    fmt: IntFormat,
    shrinks: tuple[float, ...],
    *,
    one_scale: bool,
) -> tuple[Tensor, Tensor]:
    """Coordinate descent from nearest rounding, for each of several scales."""
    span = torch.maximum(weight.amax(1) / fmt.qmax, weight.amin(1) / fmt.qmin)
    if one_scale:
        span = span.amax().expand_as(span)
    best_scale, best_steps, least = span, torch.zeros_like(weight), None
    for shrink in shrinks:
        scale = (span * shrink).clamp(min=torch.finfo(torch.float32).tiny)
        steps = fmt.round(weight / scale[:, None])
        error = weight - steps * scale[:, None]
        for _ in range(SWEEPS):
            _descend(weight, moments, scale, steps, error, fmt)
        loss = (error * (moments @ error)).sum(1)
        if one_scale:
            loss = loss.sum().expand_as(loss)
        if least is None:
            best_scale, best_steps, least = scale, steps, loss
            continue
        better = loss < least
        best_scale = torch.where(better, scale, best_scale)
        best_steps = torch.where(better[:, None], steps, best_steps)
        least = torch.minimum(loss, least)
    scale = best_scale.flatten()
    return (scale[:1] if one_scale else scale), best_steps


def _descend(
    weight: Tensor, moments: Tensor, scale: Tensor, steps: Tensor, error: Tensor, fmt: IntFormat
) -> None:
    """One sweep: each weight in turn is rounded to where the loss is least; in place."""
    gradient = moments @ error
    for k in range(weight.shape[1]):
        own = moments[:, k, k, None]
        target = weight[:, k] + gradient[:, k] / own - error[:, k]
        rounded = fmt.round(target / scale)
        moved = weight[:, k] - rounded * scale - error[:, k]
        gradient += moments[:, :, k, None] * moved[:, None]
        steps[:, k] = rounded
        error[:, k] += moved
