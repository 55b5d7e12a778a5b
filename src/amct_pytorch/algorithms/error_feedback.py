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
# Elements of a matrix that change places together.
FLIPPED_AT_ONCE = 2**16


@dataclass(frozen=True)
class Factorization:
    """H + damping·I = U Uᵀ with U upper triangular.

    Attributes:
        transposed: Uᵀ, float32 [K, K], contiguous.
        damping: what was added to the diagonal.
    """

    transposed: Tensor
    damping: float

    def solve(self, right: Tensor) -> Tensor:
        """X in (H + damping·I) X = right, [K, any]."""
        half = torch.linalg.solve_triangular(self.transposed.T, right, upper=True)
        solved: Tensor = torch.linalg.solve_triangular(self.transposed, half, upper=False)
        return solved


def factorize(hessian: Tensor, damping: float, order: Tensor | None = None) -> Factorization | None:
    """Factorizes, with ten times the damping after each failure.

    Args:
        hessian: float32 [K, K], symmetric.
        damping: first damping as a fraction of the mean of the diagonal.
        order: of rows and columns in what is factorized, [K]; None: as they are.

    Returns:
        None if the matrix is not positive definite either with all of the mean (MOST_DAMPING)
        or more added, which no sum of x xᵀ is.
    """
    mean = float(hessian.diagonal().mean())
    backward = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backward = backward.flip(0)
    while True:
        # Flipped along both axes, a lower triangular factor becomes an upper triangular one.
        matrix = hessian[backward[:, None], backward]
        matrix.diagonal().add_(damping * mean)
        lower = _cholesky(matrix)
        del matrix  # the largest layers decide on peak memory: no copy stays longer than it must
        if lower is not None:
            return Factorization(_flipped(lower.T), damping * mean)
        if damping >= MOST_DAMPING:
            return None
        damping = max(10 * damping, LEAST_DAMPING)


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor of a symmetric matrix, which is overwritten; None if there is none."""
    if matrix.device.type == "cpu":
        # LAPACK works on columns: to it the transposed view is the matrix in its own order.
        lower, failed = matrix.mT, torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
    else:
        lower, failed = torch.linalg.cholesky_ex(matrix)
    return lower if not int(failed) and is_finite(lower) else None


def _flipped(square: Tensor) -> Tensor:
    """`square` flipped along both axes, in its own memory where that is contiguous."""
    square = square.contiguous()
    flat = square.view(-1)
    size = len(flat)
    for start in range(0, size // 2, FLIPPED_AT_ONCE):
        stop = min(start + FLIPPED_AT_ONCE, size // 2)
        head = flat[start:stop].flip(0)
        flat[start:stop] = flat[size - stop : size - start].flip(0)
        flat[size - stop : size - start] = head
    return square


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

    def reorder(self, index: Tensor, granule_of: list[int]) -> None:
        """Takes rows in another order.

        Args:
            index: for each row of the new order, which row it is now.
            granule_of: of the rows in the new order.
        """
        # One after the other, so that no more than one is there twice.
        self.weight = self.weight[index]
        self.steps = self.steps[index]
        self.error = self.error[index]
        self.granule_of = granule_of


def feed_forward(
    rounding: Rounding, feedback: Tensor, diagonal: Tensor, importance: Tensor
) -> Tensor:
    """Rounds all rows in order.

    Factors that are not known are searched when their granule is reached, on weights that have
    taken up the errors of all rows before. The rows of such a granule must be neighbours.

    Args:
        rounding: the weights; steps, error and factors are filled in.
        feedback: Ũᵀ of H + damping·I in the order of the rows, [K, K].
        diagonal: D^(1/2), [K].
        importance: [K], what a squared error of each row costs in the search for factors.

    Returns:
        (E U)ᵀ with U = Ũ D^(1/2), [K, N]: its squared norm is tr(E (H + damping·I) Eᵀ).
    """
    unknown = {
        start: stop
        for start, stop in granule_spans(rounding.granule_of)
        if rounding.factors[rounding.granule_of[start]] is None
    }
    target = rounding.weight.clone()
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
