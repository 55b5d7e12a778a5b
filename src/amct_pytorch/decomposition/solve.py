"""One layer: both kernel orders tried, one taken, its factors and their error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amct_pytorch.decomposition.factorise import Factorisation, Sketch, factorise
from amct_pytorch.decomposition.geometry import Geometry, Split, weights_in
from amct_pytorch.decomposition.layer_data import Metric
from amct_pytorch.decomposition.policy import RankChoice, RankPolicy
from amct_pytorch.decomposition.tucker import cheapest_tucker

# By the kernel axis that the first piece runs along; the first piece always has the input
# channels, the first of the pair.
SPATIAL_MODES = ("FCFK", "FCSK")
TUCKER_MODE = "TUCKER2"
# Smaller sides below this are factorised completely: that costs little there.
LARGE_SIDE = 1024
# Components beyond a guessed estimate that are looked for.
ROOM = 1.1
# A measured error above the one that the energies promise by more than this is a failure.
ERROR_SLACK = 1e-4


@dataclass(frozen=True)
class Solution:
    """How one layer is split.

    Attributes:
        mode: ``FCFK`` (vertical kernel axis first), ``FCSK`` or ``TUCKER2``.
        split: shapes of the pieces' weights.
        weights: the weights, in the dtype they were solved in.
        rank: channels between the pieces (the smallest, for Tucker-2).
        estimate: what the policy wanted before bounds and rounding.
        at_least: whether the estimate is a lower bound, at or above the policy's own bound.
        error: relative Frobenius error of the weight, measured on the factors.
        other_error: error that the other order would have at equal cost, for large layers
            guessed to a few percent; in the metric of the inputs, if one is given.
        method: how the factors were found.
    """

    mode: str
    split: Split
    weights: list[Tensor]
    rank: int
    estimate: int
    at_least: bool
    error: float
    other_error: float | None
    method: str


@dataclass(frozen=True)
class _Order:
    """One of the two kernel orders.

    Attributes:
        axis: kernel axis of the first piece.
        matrix: the weight's.
        found: factorisation of the weight, or of the weight in the metric of its inputs.
        choice: the rank, by the weight alone.
        root: of the metric; None without one.
    """

    axis: int
    matrix: Tensor
    found: Factorisation
    choice: RankChoice
    root: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two factors of the weight's matrix."""
        if self.root is None:
            return self.found.factors(self.matrix, self.choice.rank)
        shaped = self.root.T @ self.matrix.to(self.root)
        left, right = self.found.factors(shaped, self.choice.rank)
        left = torch.linalg.solve_triangular(self.root.T, left, upper=True)
        return left.to(self.matrix), right.to(self.matrix)


def solve_layer(
    weight: Tensor,
    geometry: Geometry,
    policy: RankPolicy,
    *,
    minimum_saving: float = 0.0,
    tucker: bool = False,
    metric: Metric | None = None,
) -> Solution | str:
    """Splits one weight.

    Args:
        weight: [N, C, kh, kw]; float16 and bfloat16 are solved in float32.
        geometry: of the layer.
        policy: decides the rank.
        minimum_saving: share of weights and FLOPs that must at least be saved.
        tucker: whether the Tucker-2 form is taken where it costs less at no more error.
        metric: of the layer's inputs: factors and order then keep the error of the outputs
            small, not that of the weight; ranks stay those of the weight.

    Returns:
        The solution, or the reason why there is none.
    """
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    ends = torch.stack(weight.aminmax())
    if not bool(torch.isfinite(ends).all()):
        return "its weight holds NaN or infinity"
    if not bool(ends.any()):
        return "its weight is all zero"
    found = None if metric is not None else _leading(weight, geometry, policy)
    if found is None:
        orders = [_examine(weight, geometry, policy, axis, metric) for axis in (0, 1)]
        orders = [order for order in orders if order.choice.rank > 0]
        if not orders:
            return "no component of its weight stands out of the noise"
        chosen = _better(orders, geometry)
        others = [order for order in orders if order is not chosen]
        found = chosen, _error_instead(others[0], chosen, geometry) if others else None
    solution = _spatial(geometry, *found)
    if tucker:
        other = cheapest_tucker(weight, geometry, solution.error)
        if other and geometry.macs(other.split) < geometry.macs(solution.split):
            solution = Solution(
                TUCKER_MODE,
                other.split,
                other.weights,
                min(other.split[1][:2]),
                solution.estimate,
                solution.at_least,
                other.error,
                solution.error,
                "gram",
            )
    return _worth_it(solution, geometry, minimum_saving) or solution


def as_matrix(weight: Tensor, axis: int) -> Tensor:
    """[N, C, kh, kw] as a matrix: (C, kernel `axis`) by (N, the other kernel axis)."""
    if axis == 0:
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return weight.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


def as_pieces(left: Tensor, right: Tensor, geometry: Geometry, axis: int) -> list[Tensor]:
    """The factors [C k, r] and [r, N k'] of `as_matrix` as the weights of two convolutions."""
    first, last = geometry.spatial(axis, left.shape[1])
    inner = right.unflatten(1, (geometry.out_channels, -1)).transpose(0, 1)
    return [left.T.reshape(first), inner.reshape(last)]


def _examine(
    weight: Tensor, geometry: Geometry, policy: RankPolicy, axis: int, metric: Metric | None
) -> _Order:
    matrix = as_matrix(weight, axis)
    for exact in (False, True):
        found = factorise(matrix, exact=exact)
        choice = policy.choose(found, *_asked(matrix, geometry, axis))
        if choice.certain or "float64" in found.method:
            break
    if metric is None or choice.rank == 0:
        return _Order(axis, matrix, found, choice)
    root = metric.root(axis)
    shaped = root.T @ matrix.to(root)
    leading = None
    if min(shaped.shape) >= LARGE_SIDE:
        leading = Sketch(shaped).components(choice.rank)
    return _Order(axis, matrix, leading or factorise(shaped), choice, root)


def _asked(
    matrix: Tensor, geometry: Geometry, axis: int
) -> tuple[tuple[int, int], int, Callable[[float], int]]:
    """What a policy is asked with: shape, channels, ranks that a share of the FLOPs pays for."""
    whole = geometry.macs(geometry.whole)
    one = geometry.macs(geometry.spatial(axis, 1))
    rows, columns = matrix.shape
    channels = min(geometry.in_channels, geometry.out_channels)
    return (rows, columns), channels, lambda share: int(share * whole / one)


def _leading(
    weight: Tensor, geometry: Geometry, policy: RankPolicy
) -> tuple[_Order, float | None] | None:
    """The better order and the other's error from leading components alone.

    The spectrum of both orders is guessed; the one that has less error at equal cost is then
    factorised to full accuracy, first as far as the guess says that it takes, then as far as the
    policy can ask for.

    Returns:
        None where the policy needs all components, or the layer is too small for this to pay,
        or the leading components do not decide, or do not stand the checks.
    """
    if weight.dtype != torch.float32:
        return None
    sketches, guesses = [], []
    for axis in (0, 1):
        matrix = as_matrix(weight, axis)
        asked = _asked(matrix, geometry, axis)
        if policy.components(*asked) is None or min(matrix.shape) < LARGE_SIDE:
            return None
        sketches.append(Sketch(matrix))
        guess = sketches[-1].guess()
        if guess is None:
            return None
        guesses.append(_Order(axis, matrix, guess, policy.choose(guess, *asked)))
    guessed = _better(guesses, geometry)
    other = guesses[1 - guessed.axis]
    sketch = sketches[guessed.axis]
    del sketches
    asked = _asked(guessed.matrix, geometry, guessed.axis)
    most = policy.components(*asked) or 0
    likely = max(guessed.choice.rank, int(ROOM * guessed.choice.estimate)) + 2
    for count in sorted({min(likely, most), most}):
        found = sketch.components(count)
        if found is None:
            return None
        choice = policy.choose(found, *asked)
        if choice.certain and 0 < choice.rank <= count:
            chosen = replace(guessed, found=found, choice=choice)
            return chosen, _error_instead(other, chosen, geometry)
    return None


def _better(orders: list[_Order], geometry: Geometry) -> _Order:
    """The order with less error at equal cost: what the cheaper of the two pays for."""
    ones = [geometry.macs(geometry.spatial(order.axis, 1)) for order in orders]
    budget = min(one * order.choice.rank for one, order in zip(ones, orders, strict=True))

    def error(place: int) -> tuple[float, int]:
        return orders[place].found.error(budget // ones[place]), ones[place]

    return orders[min(range(len(orders)), key=error)]


def _error_instead(other: _Order, chosen: _Order, geometry: Geometry) -> float:
    """The error of the order that is not taken, at the cost of the one that is."""
    ones = [geometry.macs(geometry.spatial(order.axis, 1)) for order in (chosen, other)]
    return other.found.error(max(chosen.choice.rank * ones[0] // ones[1], 1))


def _spatial(geometry: Geometry, chosen: _Order, other_error: float | None) -> Solution:
    matrix = chosen.matrix
    rank, found = chosen.choice.rank, chosen.found
    left, right = chosen.factors()
    error = _error(matrix, left, right)
    if chosen.root is None and not error <= found.error(rank) + ERROR_SLACK:
        found = factorise(matrix.double(), exact=True)
        left, right = (part.to(matrix) for part in found.factors(matrix.double(), rank))
        error = _error(matrix, left, right)
    return Solution(
        SPATIAL_MODES[chosen.axis],
        geometry.spatial(chosen.axis, rank),
        as_pieces(left, right, geometry, chosen.axis),
        rank,
        chosen.choice.estimate,
        chosen.choice.at_least,
        error,
        other_error,
        found.method,
    )


def _error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """Relative Frobenius error of left @ right."""
    return float(torch.addmm(matrix, left, right, beta=-1).norm() / matrix.norm())


def _worth_it(solution: Solution, geometry: Geometry, minimum_saving: float) -> str | None:
    """Why the split does not save enough, or None."""
    pairs = {
        "weights": (weights_in(geometry.whole), weights_in(solution.split)),
        "FLOPs": (geometry.macs(geometry.whole), geometry.macs(solution.split)),
    }
    for what, (before, after) in pairs.items():
        saved = 1 - after / before
        if saved <= 0:
            return (
                f"rank {solution.rank} would not save {what}: the pieces have "
                f"{after / before:.2f} times as many"
            )
        if saved < minimum_saving:
            return (
                f"rank {solution.rank} would save {saved:.1%} of its {what}; minimum_saving "
                f"asks for {minimum_saving:.1%}"
            )
    return None
