"""Ranges of weight granules, narrowed where the layer's output error falls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from amct_pytorch.algorithms.weight_grid import MX_SHRINKS, SHRINKS, Factors, WeightGrid
from amct_pytorch.formats import MicroscalingFormat, QuantParams
from amct_pytorch.formats.quantizer import scale_from_range


def clip_search(
    weight: Tensor, params: QuantParams, second_moments: Tensor, grid: WeightGrid
) -> QuantParams:
    """Coordinate descent over granules: each takes the range that makes the output error least.

    Granules are gone through group by group along the input axis, all output channels at once.
    What an error e of a granule costs depends on the row's other granules: e H_gg eᵀ + 2 e · r
    with r what H carries over from their errors. The factors that a granule has are among the
    candidates, so the output error never grows.

    Args:
        weight: float32 [N, K].
        params: its factors to begin with.
        second_moments: float32 [K, K], mean of x xᵀ over tokens.
        grid: the numbers that the weight may take.

    Returns:
        The factors chosen.
    """
    columns, channels = weight.shape[1], weight.shape[0]
    size = grid.group_size(columns)
    spans = [slice(start, start + size) for start in range(0, columns, size)]
    target = weight.T.contiguous()
    # Without groups one column of factors; a single scale for the whole tensor stands in each row.
    scale = params.scale.expand(channels, len(spans)).T.clone()
    offset = params.offset
    offset = None if offset is None else offset.expand(channels, len(spans)).T.float()
    chosen = [
        Factors(scale[group], None if offset is None else offset[group])
        for group in range(len(spans))
    ]
    errors = [
        grid.snap(target[span], factors).mul_(factors.scale).sub_(target[span])
        for span, factors in zip(spans, chosen, strict=True)
    ]
    carried = second_moments @ torch.cat(errors)
    for group, span in enumerate(spans):
        own, error = second_moments[span, span], errors[group]
        others = (carried[span] - own @ error).mul_(2)
        best, least = error, _cost(error, own, others, grid)
        for tried in _candidates(target[span], grid):
            values = grid.snap(target[span], tried).mul_(tried.scale).sub_(target[span])
            cost = _cost(values, own, others, grid)
            better = cost < least
            least = torch.where(better, cost, least)
            best = torch.where(better, values, best)
            chosen[group] = _where(better, tried, chosen[group])
        carried.addmm_(second_moments[:, span], best - error)
    return _params(chosen, weight, grid)


def _candidates(granule: Tensor, grid: WeightGrid) -> Iterator[Factors]:
    """Factors for fractions of the range of each column of a granule [k, N]."""
    low, high = granule.amin(0), granule.amax(0)
    if grid.granularity.kind == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    for shrink in MX_SHRINKS if isinstance(grid.fmt, MicroscalingFormat) else SHRINKS:
        found = scale_from_range(low * shrink, high * shrink, grid.fmt, symmetric=grid.symmetric)
        yield Factors(found.scale, None if found.offset is None else found.offset.float())


def _cost(error: Tensor, own: Tensor, others: Tensor, grid: WeightGrid) -> Tensor:
    """What an error [k, N] of a granule adds to the output error, [N]."""
    cost = (own @ error).add_(others).mul_(error).sum(0)
    return cost.sum().expand_as(cost) if grid.granularity.kind == "tensor" else cost


def _where(better: Tensor, tried: Factors, before: Factors) -> Factors:
    scale = torch.where(better, tried.scale, before.scale)
    if tried.offset is None or before.offset is None:
        return Factors(scale)
    return Factors(scale, torch.where(better, tried.offset, before.offset))


def _params(chosen: list[Factors], weight: Tensor, grid: WeightGrid) -> QuantParams:
    shape = grid.granularity.scales_shape(weight.shape)

    def gathered(parts: list[Tensor]) -> Tensor:
        stacked = torch.stack(parts, dim=1)
        return stacked.flatten()[:1] if shape == (1,) else stacked.reshape(shape)

    offsets = [factors.offset for factors in chosen if factors.offset is not None]
    return QuantParams(
        gathered([factors.scale for factors in chosen]),
        gathered(offsets).to(torch.int32) if offsets else None,
    )
