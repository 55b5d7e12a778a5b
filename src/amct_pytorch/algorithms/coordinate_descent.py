"""Going over rounded weights again: each column, then each scale, given all the others.

After one pass of error feedback a column could not know how those after it would be rounded.
With E = W - Ŵ and G = E H, the loss tr(E H Eᵀ) as a function of column k alone is least at
Ŵ_k = W_k + (G_k - H_kk E_k) / H_kk; rounding this is exact, because the function is the same
parabola around it for each output channel (QuantEase, arXiv 2309.01885). With the
multiples Z of a scale held, the best scale is s + (Z·G) / (Z H Zᵀ). No step raises the loss.

Matrices of weights are transposed, [K, N]: see `weight_grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.algorithms.error_feedback import LEAF, Rounding, granule_spans, total
from amct_pytorch.algorithms.weight_grid import Factors
from amct_pytorch.formats import MicroscalingFormat

# How far one refit may move a scale. Beyond this its multiples no longer fit.
SCALE_LIMITS = (0.5, 2.0)


def sweep(rounding: Rounding, matrix: Tensor, gradient: Tensor, *, last: bool) -> float:
    """Refits each granule's scale and rounds its columns again, all granules in order.

    Args:
        rounding: rounded weights with factors; the rows of each granule are neighbours.
            Changed in place.
        matrix: H, float32 [K, K], positive diagonal.
        gradient: (E H)ᵀ, [K, N]; brought up to date in place, unless `last`.
        last: whether no other sweep follows: half of the work is then saved.

    Returns:
        How much the loss tr(E H Eᵀ) has fallen.
    """
    recursion = _Sweep(rounding, matrix, gradient, last)
    recursion.run(0, len(matrix))
    return recursion.gained


# A recursive closure would hold itself, and the matrices with it, until the collector comes by.
class _Sweep:
    """The recursion of `sweep`, with its arguments.

    Attributes:
        gained: how much the loss has fallen so far.
    """

    def __init__(self, rounding: Rounding, matrix: Tensor, gradient: Tensor, last: bool) -> None:
        self.gained = 0.0
        self._rounding, self._matrix, self._gradient = rounding, matrix, gradient
        self._last = last
        self._change = torch.zeros_like(rounding.error)
        self._diagonal = matrix.diagonal()
        self._own = self._diagonal.tolist()
        self._spans = dict(granule_spans(rounding.granule_of))
        self._refits = not isinstance(rounding.grid.fmt, MicroscalingFormat)

    def run(self, start: int, stop: int) -> None:
        """Leaves what has changed in `_change`, and the gradient there right unless `_last`."""
        error, change = self._rounding.error, self._change
        matrix, gradient = self._matrix, self._gradient
        whole = self._spans.get(start) == stop and self._refits
        if whole:
            before = error[start:stop].clone()
            self.gained += refit(self._rounding, matrix, gradient, start, stop)
        edges = [edge for edge in self._spans if start < edge < stop]
        if stop - start <= LEAF and not edges:
            self._leaf(start, stop)
        else:
            half = (start + stop) // 2
            middle = min(edges, key=lambda edge: abs(edge - half)) if edges else half
            self.run(start, middle)
            gradient[middle:stop].addmm_(matrix[middle:stop, start:middle], change[start:middle])
            self.run(middle, stop)
            if not self._last:
                changed = change[middle:stop]
                gradient[start:middle].addmm_(matrix[start:middle, middle:stop], changed)
        if whole:
            torch.sub(error[start:stop], before, out=change[start:stop])

    def _leaf(self, start: int, stop: int) -> None:
        """Rounds the rows of a leaf again, one after the other."""
        rounding, matrix = self._rounding, self._matrix
        weight, error, change = rounding.weight, rounding.error, self._change
        before = error[start:stop].clone()
        slopes = self._gradient[start:stop]
        for row in range(start, stop):
            slope = self._gradient[row]
            if row > start:
                torch.sub(error[row - 1], before[row - 1 - start], out=change[row - 1])
                # From here on this row of the gradient is not read: `slopes` may hold it.
                slope.addmv_(change[start:row].T, matrix[row, start:row])
            target = torch.add(weight[row], slope, alpha=1 / self._own[row]).sub_(error[row])
            rounding.set_row(row, target)
        moved = torch.sub(error[start:stop], before, out=change[start:stop])
        # A row's step changes the loss by 2 d·g + h d² with g its gradient before the step.
        steps = torch.addcmul(2 * slopes, moved, self._diagonal[start:stop, None])
        self.gained -= total(steps.mul_(moved))
        if not self._last:
            slopes.addmm_(matrix[start:stop, start:stop].triu(), moved)


def refit(rounding: Rounding, matrix: Tensor, gradient: Tensor, start: int, stop: int) -> float:
    """Gives one granule the scale that is best for its multiples; see `sweep`.

    Args:
        rounding: changed in place.
        matrix: H.
        gradient: (E H)ᵀ; rows start to stop are brought up to date, the others are not.
        start: first row of the granule.
        stop: the row after its last.

    Returns:
        How much the loss has fallen.
    """
    steps = rounding.steps[start:stop]
    block = matrix[start:stop, start:stop]
    bend = block @ steps
    slope = (steps * gradient[start:stop]).sum(0)
    cost = (steps * bend).sum(0)
    if rounding.grid.granularity.kind == "tensor":
        slope, cost = slope.sum()[None], cost.sum()[None]
    old = rounding.factors_of(start)
    # A granule rounded to zeros has no cost and keeps its scale.
    move = torch.where(cost > 0, slope / cost, torch.zeros_like(slope))
    low, high = SCALE_LIMITS
    scale = torch.clamp(old.scale + move, low * old.scale, high * old.scale)
    move = scale - old.scale
    rounding.factors[rounding.granule_of[start]] = Factors(scale, old.offset)
    rounding.error[start:stop].sub_(steps * move)
    gradient[start:stop].sub_(bend.mul_(move))
    moved = move[: len(slope)]
    return float((2 * slope - cost * moved).mul_(moved).sum(dtype=torch.float64))
