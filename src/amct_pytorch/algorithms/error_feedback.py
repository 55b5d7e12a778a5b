"""Rounding a weight matrix column by column, with the error fed forward.

For E = W - Ŵ and H = Ũ D Ũᵀ with Ũ unit upper triangular, the output error is

    tr(E H Eᵀ) = Σ_k D_k ‖E_k + Σ_{i<k} E_i Ũ_ik‖²,

so going from the first column to the last, each is rounded to the nearest number to
W_k + Σ_{i<k} E_i Ũ_ik. This gives what GPTQ (arXiv 2210.17323, algorithm 1) computes from the
Cholesky factor of the inverse (QuIP, arXiv 2307.13304, theorem 6), without the inverse.

Matrices of weights are transposed, [K, N]: see `weight_grid`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from amct_pytorch.algorithms.finite import is_finite
from amct_pytorch.algorithms.hessian import STRIP
from amct_pytorch.algorithms.weight_grid import Factors, WeightGrid

# Columns that are rounded one after another before the rest hears of their errors.
LEAF = 32
# After a failure, dampings of this fraction of the mean of the diagonal and above are tried.
LEAST_DAMPING = 1e-6
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Factorization:
    """H + damping·I = U Uᵀ with U upper triangular.

    Attributes:
        upper: U, float32 [K, K].
        damping: what was added to the diagonal.
    """

    upper: Tensor
    damping: float

    def solve(self, right: Tensor) -> Tensor:
        """X in (H + damping·I) X = right, [K, any]."""
        half = torch.linalg.solve_triangular(self.upper, right, upper=True)
        solved: Tensor = torch.linalg.solve_triangular(self.upper.T, half, upper=False)
        return solved


def factorize(hessian: Tensor, damping: float) -> Factorization | None:
    """Factorizes, with ten times the damping after each failure.

    Args:
        hessian: float32 [K, K], symmetric.
        damping: first damping as a fraction of the mean of the diagonal.

    Returns:
        None if the matrix is not positive definite either with all of the mean (MOST_DAMPING)
        or more added, which no sum of x xᵀ is.
    """
    mean = float(hessian.diagonal().mean())
    while True:
        # Flipped along both axes, a lower triangular factor becomes an upper triangular one.
        matrix = hessian.flip(0, 1)
        matrix.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        del matrix  # the largest layers decide on peak memory: copies are let go when done with
        if not int(failed) and is_finite(lower):
            return Factorization(lower.flip(0, 1), damping * mean)
        if damping >= MOST_DAMPING:
            return None
        damping = max(10 * damping, LEAST_DAMPING)


@dataclass
class Rounding:
    """A weight matrix and what it is rounded to; columns of H are rows here.

    Attributes:
        weight: what the rounded weights should come near to, float32 [K, N].
        grid: the numbers that are allowed.
        granule_of: the granule of each row, K indices.
        factors: the factors of each granule; None until they are known.
        steps: rounded weights in units of their scale, [K, N].
        error: weight - rounded weight, [K, N].
    """

    weight: Tensor
    grid: WeightGrid
    granule_of: list[int]
    factors: list[Factors | None]
    steps: Tensor = field(init=False)
    error: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.steps = torch.zeros_like(self.weight)
        self.error = torch.zeros_like(self.weight)

    def factors_of(self, row: int) -> Factors:
        """The factors of a row's granule."""
        factors = self.factors[self.granule_of[row]]
        assert factors is not None
        return factors

    def set_row(self, row: int, target: Tensor) -> None:
        """Rounds one row to what is nearest to `target`."""
        factors = self.factors_of(row)
        steps = self.grid.snap(target, factors)
        self.steps[row] = steps
        torch.addcmul(self.weight[row], steps, factors.scale, value=-1, out=self.error[row])

    def rounded(self) -> Tensor:
        """The rounded weights, [K, N]."""
        return self.weight - self.error


def feed_forward(rounding: Rounding, upper: Tensor, importance: Tensor) -> Tensor:
    """Rounds all rows in order.

    Factors that are not known are searched when their granule is reached, on weights that have
    taken up the errors of all rows before. The rows of such a granule must be neighbours.

    Args:
        rounding: the weights; steps, error and factors are filled in.
        upper: U, the factor of H + damping·I in the order of the rows, [K, K].
        importance: [K], what a squared error of each row costs in the search for factors.

    Returns:
        (E U)ᵀ, [K, N]: its squared norm is tr(E (H + damping·I) Eᵀ).
    """
    diagonal = upper.diagonal()
    unknown = {
        start: stop
        for start, stop in granule_spans(rounding.granule_of)
        if rounding.factors[rounding.granule_of[start]] is None
    }
    target = rounding.weight.clone()
    feedback = torch.div(upper.T, diagonal[:, None], out=torch.empty_like(upper))
    _Feedback(rounding, target, feedback, importance, unknown).run(0, len(target))
    # The rounded row is weight - error, so this is the error in the last target, times D^(1/2).
    return target.sub_(rounding.weight).add_(rounding.error).mul_(diagonal[:, None])


# A recursive closure would hold itself, and the matrices with it, until the collector comes by.
@dataclass(frozen=True)
class _Feedback:
    """The recursion of `feed_forward`.

    Attributes:
        rounding: the weights.
        target: what each row is to be rounded to, [K, N].
        feedback: Ũᵀ, [K, K].
        importance: [K].
        unknown: first row of each granule without factors and the row after its last.
    """

    rounding: Rounding
    target: Tensor
    feedback: Tensor
    importance: Tensor
    unknown: dict[int, int]

    def run(self, start: int, stop: int) -> None:
        """Rounds the rows from `start` to `stop`."""
        rounding, target, feedback = self.rounding, self.target, self.feedback
        error = rounding.error
        if self.unknown.get(start) == stop:
            found = rounding.grid.search(target[start:stop], self.importance[start:stop])
            rounding.factors[rounding.granule_of[start]] = found
        edges = [edge for edge in self.unknown if start < edge < stop]
        if stop - start <= LEAF and not edges:
            for row in range(start, stop):
                if row > start:
                    target[row].addmv_(error[start:row].T, feedback[row, start:row])
                rounding.set_row(row, target[row])
            return
        half = (start + stop) // 2
        middle = min(edges, key=lambda edge: abs(edge - half)) if edges else half
        self.run(start, middle)
        target[middle:stop].addmm_(feedback[middle:stop, start:middle], error[start:middle])
        self.run(middle, stop)


def granule_spans(granule_of: list[int]) -> list[tuple[int, int]]:
    """First row and the one after the last of each run of rows with one granule."""
    starts = [i for i, g in enumerate(granule_of) if i == 0 or granule_of[i - 1] != g]
    return list(zip(starts, [*starts[1:], len(granule_of)], strict=True))


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) for an error [K, N], by halves: H is symmetric, so each block is used twice."""
    rows = len(error)
    if rows <= 2 * LEAF:
        return total((hessian @ error).mul_(error))
    half = rows // 2
    crossed = (hessian[:half, half:] @ error[half:]).mul_(error[:half])
    return (
        output_error(error[:half], hessian[:half, :half])
        + output_error(error[half:], hessian[half:, half:])
        + 2 * total(crossed)
    )


def total(x: Tensor) -> float:
    """The sum of a matrix: rows in its own precision, then in float64.

    Summing all of it in float64 would first make a copy of it in float64.
    """
    return float(x.sum(1).sum(dtype=torch.float64))


def upper_times(upper: Tensor, x: Tensor) -> Tensor:
    """The product of an upper triangular [K, K] and a [K, N], at little over half the work."""
    strips = [upper[start : start + STRIP, start:] @ x[start:] for start in range(0, len(x), STRIP)]
    return torch.cat(strips)
