"""GPTQ: weights rounded so that the errors of one make up for those of the others.

Source: Frantar et al., GPTQ (arXiv 2210.17323), with the order of columns and the damping of its
public discussion, scales searched under the Hessian, and sweeps of coordinate descent after it
(arXiv 2309.01885). The steps are in `error_feedback`, `coordinate_descent` and `weight_grid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.algorithms.coordinate_descent import sweep
from amct_pytorch.algorithms.error_feedback import (
    Rounding,
    factorize,
    feed_forward,
    granule_spans,
    output_error,
    total,
    upper_times,
)
from amct_pytorch.algorithms.finite import is_finite
from amct_pytorch.algorithms.weight_grid import Factors, WeightGrid
from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import Granularity, NumberFormat
from amct_pytorch.formats.quantizer import fake_quantize, params_of, quantize

# What an error of a weight costs that no token has reached, in units of the others' mean.
DEAD_SHARE = 1e-2


@dataclass(frozen=True)
class GptqSettings:
    """How a layer is solved.

    Attributes:
        damping: added to the Hessian's diagonal, as a fraction of its mean; at least 0. Ten
            times as much is tried while the factorization fails.
        act_order: columns with the largest inputs are rounded first, while there are others
            left to take up their errors.
        static_groups: all scales are chosen before the first column is rounded, so that columns
            can be ordered regardless of groups. Without it a group's scales are chosen when
            it is reached, after feedback, and `act_order` orders the groups by their largest
            column and the columns within each.
        sweeps: passes of coordinate descent that follow; at least 0.

    Raises:
        ArgumentValueError: on construction, for a value that is not allowed above.
    """

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    sweeps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise ArgumentValueError(f"damping is {self.damping}; allowed are 0 and above")
        if self.sweeps < 0:
            raise ArgumentValueError(f"sweeps is {self.sweeps}; allowed are 0 and above")


@dataclass(frozen=True)
class GptqResult:
    """A quantized weight and how it was come by.

    Losses are tr(E H Eᵀ) with E = target - quantized weight and H without damping: the mean
    squared output error of a token, summed over output channels.

    Attributes:
        codes: [N, K], unpacked, of the format's code dtype.
        scale: float32 of the granularity's `scales_shape`.
        offset: int32 of the same shape; None for symmetric quantization.
        loss_nearest: of rounding each weight to the nearest number.
        loss: of what is returned, never above `loss_nearest`.
        damping: what was added to the Hessian's diagonal.
        dead_columns: how many input channels had no input; their weights are rounded to the
            nearest.
        fell_back: why the weights were rounded to the nearest after all; None if they were not.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    loss_nearest: float
    loss: float
    damping: float
    dead_columns: int
    fell_back: str | None = None


def solve_gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: NumberFormat,
    granularity: Granularity,
    *,
    symmetric: bool = True,
    settings: GptqSettings = GptqSettings(),
    target: Tensor | None = None,
    tokens: int | None = None,
) -> GptqResult:
    """Quantizes the weight of a linear layer given the second moments of its input.

    Args:
        weight: floating [N, K]: N output and K input channels.
        hessian: [K, K], symmetric, such as `Hessian.mean()`; on the device of `weight`.
        fmt: the number format.
        granularity: kind tensor, channel or group. A last group may be short.
        symmetric: without offsets; False is for integers only.
        settings: how to solve.
        target: [N, K], what the layer should come near to instead of `weight`, such as
            one corrected by `target_correction`.
        tokens: how many the Hessian is the mean of; see `prepare`.

    Raises:
        ArgumentValueError: for shapes that do not fit, values that are not finite, or a
            combination that is not allowed above.
    """
    grid = WeightGrid(fmt, granularity, symmetric)
    prepared = prepare(hessian.clone(), grid, settings, tokens)
    return solve_prepared(weight, prepared, grid, settings, target=target)


@dataclass(frozen=True)
class PreparedHessian:
    """What all layers with one input need of their Hessian, to be computed once.

    Attributes:
        matrix: H with `ridge` added to its diagonal, float32 [K, K].
        ridge: damping, what few tokens ask for, and all of the diagonal of dead columns, [K].
        dead: which input channels had no input, bool [K].
        order: of the columns in rounding.
        feedback: Ũᵀ with Ũ D Ũᵀ the matrix in that order, [K, K]; None if it cannot be
            factorized.
        diagonal: D^(1/2), [K].
        damping: what was added to the diagonal.
    """

    matrix: Tensor
    ridge: Tensor
    dead: Tensor
    order: Tensor
    feedback: Tensor | None
    diagonal: Tensor
    damping: float

    def loss(self, error: Tensor) -> float:
        """tr(E H Eᵀ) without the ridge, for an error [K, N] whose dead rows are set to 0."""
        error[self.dead] = 0
        return max(output_error(error, self.matrix) - self.charge(error), 0.0)

    def charge(self, error: Tensor) -> float:
        """What the ridge adds to tr(E H Eᵀ), for an error [K, N]."""
        return float(self.ridge.double() @ error.square().sum(1).double())


def prepare(
    hessian: Tensor, grid: WeightGrid, settings: GptqSettings, tokens: int | None = None
) -> PreparedHessian:
    """Orders, damps and factorizes a Hessian.

    Few tokens show correlations between channels that others do not have, and what makes up for
    an error by those does harm on others. So the diagonal grows by the share K / (K + tokens):
    with many tokens next to nothing, with few what rounds to the nearest.

    Args:
        hessian: [K, K], symmetric; may be changed and kept.
        grid: only its group size matters, and only without `static_groups`.
        settings: how layers are to be solved; `sweeps` does not matter.
        tokens: how many the Hessian is the mean of; None: as many as could be.

    Raises:
        ArgumentValueError: if it is no square matrix or holds NaN or infinity.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.numel():
        raise ArgumentValueError(
            f"hessian has shape {tuple(hessian.shape)}; allowed is [K, K], above 0"
        )
    _check_finite("hessian", hessian)
    matrix = hessian.float()
    own = matrix.diagonal().clone()
    dead = own <= 0
    size = len(own)
    ridge = own * (0.0 if tokens is None else size / (size + tokens))
    # Other data may reach them: they are to count, but next to nothing beside the others.
    ridge[dead] = DEAD_SHARE * float(own.mean()) or 1.0
    matrix.diagonal().add_(ridge)
    order = _column_order(matrix.diagonal(), grid, settings)
    factorization = factorize(matrix, settings.damping, order)
    if factorization is None:
        return PreparedHessian(matrix, ridge, dead, order, None, matrix.diagonal(), 0.0)
    matrix.diagonal().add_(factorization.damping)
    ridge.add_(factorization.damping)
    feedback = factorization.transposed
    diagonal = feedback.diagonal().clone()
    feedback.div_(diagonal[:, None])
    return PreparedHessian(matrix, ridge, dead, order, feedback, diagonal, factorization.damping)


def solve_prepared(
    weight: Tensor,
    prepared: PreparedHessian,
    grid: WeightGrid,
    settings: GptqSettings,
    *,
    target: Tensor | None = None,
) -> GptqResult:
    """`solve_gptq` with a Hessian that several layers share.

    Args:
        weight: floating [N, K].
        prepared: from `prepare` with the same settings and group size.
        grid: the numbers that are allowed.
        settings: how to solve.
        target: as in `solve_gptq`.

    Raises:
        ArgumentValueError: for shapes that do not fit, or values that are not finite.
    """
    weight = weight.detach()
    _check(weight, prepared.matrix, target)
    aim = (weight if target is None else target.detach()).float()
    fmt, granularity = grid.fmt, grid.granularity
    params = params_of(weight, fmt, granularity, symmetric=grid.symmetric)
    nearest = fake_quantize(weight.float(), params.scale, params.offset, fmt, granularity)
    error = nearest.sub_(aim).T.contiguous()
    del nearest
    loss_nearest = prepared.loss(error)
    del error
    dead = int(prepared.dead.sum())
    damping = prepared.damping
    if dead == len(prepared.dead):
        reason = "no input channel had any input"
    elif prepared.feedback is None:
        reason = "the Hessian is not positive definite, however damped"
    else:
        rounding, loss = _round(aim, prepared, prepared.feedback, grid, settings)
        if loss <= loss_nearest:
            codes, scale, offset = _quantized(rounding)
            return GptqResult(codes, scale, offset, loss_nearest, loss, damping, dead)
        reason = "rounding to the nearest has the smaller error"
    codes = quantize(weight, params.scale, params.offset, fmt, granularity)
    return GptqResult(
        codes, params.scale, params.offset, loss_nearest, loss_nearest, damping, dead, reason
    )


def _column_order(importance: Tensor, grid: WeightGrid, settings: GptqSettings) -> Tensor:
    """The columns in the order in which they are rounded."""
    columns = torch.arange(len(importance), device=importance.device)
    if not settings.act_order:
        return columns
    if settings.static_groups:
        return importance.argsort(descending=True, stable=True)
    groups = [
        group[importance[group].argsort(descending=True, stable=True)]
        for group in columns.split(grid.group_size(len(columns)))
    ]
    groups.sort(key=lambda group: -float(importance[group[0]]))
    return torch.cat(groups)


def _round(
    aim: Tensor,
    prepared: PreparedHessian,
    feedback: Tensor,
    grid: WeightGrid,
    settings: GptqSettings,
) -> tuple[Rounding, float]:
    """The rounded weight, its columns where they were, and its loss without the ridge.

    Args:
        aim: [N, K].
        prepared: the Hessian.
        feedback: its factor.
        grid: the numbers that are allowed.
        settings: how to solve.
    """
    weight = aim.T.clone(memory_format=torch.contiguous_format)
    order, matrix = prepared.order, prepared.matrix
    size = grid.group_size(len(weight))
    granule_of = torch.arange(len(weight), device=order.device) // size
    importance = matrix.diagonal()
    factors: list[Factors | None] = [None] * -(-len(weight) // size)
    if settings.static_groups:
        groups = zip(weight.split(size), importance.split(size), strict=True)
        factors = [grid.search(rows, weights) for rows, weights in groups]
    weight = weight[order]
    rounding = Rounding(weight, grid, granule_of[order].tolist(), factors)
    del weight  # `rounding` has it, and changes it for another
    output = feed_forward(rounding, feedback, prepared.diagonal, importance[order])
    loss = total(output.square())
    back = order.argsort()
    if settings.sweeps:
        output = upper_times(feedback.T, output.mul_(prepared.diagonal[:, None]))[back]
    rounding.reorder(back, granule_of.tolist())
    for left in reversed(range(settings.sweeps)):
        loss -= sweep(rounding, matrix, output, last=not left)
    charge = prepared.charge(rounding.error)
    # Only the steps are needed from here on, and the memory of the rest is.
    rounding.weight = rounding.error = rounding.steps.new_empty(0)
    return rounding, max(loss - charge, 0.0)


def _quantized(rounding: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and offsets of a rounded weight."""
    grid, steps = rounding.grid, rounding.steps
    known = [rounding.factors_of(start) for start, _ in granule_spans(rounding.granule_of)]
    scale = torch.stack([factors.scale for factors in known], dim=1)
    offset = None
    if not grid.symmetric:
        offset = torch.stack([f.offset for f in known if f.offset is not None], dim=1)
        sizes = torch.tensor([b - a for a, b in granule_spans(rounding.granule_of)])
        steps.add_(offset.T.repeat_interleave(sizes.to(steps.device), dim=0))
        offset = _by_granularity(offset, grid).int()
    return grid.fmt.encode(steps.T), _by_granularity(scale, grid), offset


def _by_granularity(factors: Tensor, grid: WeightGrid) -> Tensor:
    """[N, granules] in the shape of the granularity's scales."""
    return factors[:1, 0] if grid.granularity.kind == "tensor" else factors


def _check(weight: Tensor, hessian: Tensor, target: Tensor | None) -> None:
    if weight.dim() != 2 or not weight.numel():
        raise ArgumentValueError(
            f"weight has shape {tuple(weight.shape)}; allowed is [N, K], both above 0"
        )
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ArgumentValueError(
            f"hessian has shape {tuple(hessian.shape)}; a weight of shape "
            f"{tuple(weight.shape)} needs {(columns, columns)}"
        )
    _check_finite("weight", weight)
    if target is None:
        return
    if target.shape != weight.shape:
        raise ArgumentValueError(
            f"target has shape {tuple(target.shape)}; allowed is that of weight, "
            f"{tuple(weight.shape)}"
        )
    _check_finite("target", target)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise ArgumentValueError(f"{name} holds NaN or infinity")
