"""One thin factorisation of a matrix: energies of its components, vectors of the leading ones.

The components are the eigenvectors of the Gram matrix of the smaller side, an order of
magnitude cheaper than a singular value decomposition. Squaring halves the digits, which does no
harm here: small components are either dropped, or kept with their *orthonormal* vectors, which
lose nothing. What can go wrong is checked, and then done again in float64, and then by SVD.

Where a bound on the rank is known before, `Sketch` guesses the spectrum and then finds just the
leading components.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from amct_pytorch.decomposition import lanczos
from amct_pytorch.decomposition.lanczos import Lanczos, leading_vectors

# Relative errors of a sound float32 eigen-decomposition are near 1e-6; this is far above.
TOLERANCE = 1e-4
# Rounding errors of an eigenvalue, in units of the last place of the largest.
ROUNDING = 16
# Parts that a Gram matrix is made in: of each pair of equal halves only one is computed.
GRAM_PARTS = 6
# By how much vectors that are nearly the leading ones may raise the relative error.
PRECISION = 1e-5
# Steps of a sketch that guess a spectrum.
COARSE = 6
# Vectors in a sketch's basis that find components: by their number, and some steps more; where
# they are not accurate enough, so many by their number for each decimal digit that is missing.
FINE, STEPS, DIGIT = 1.9, 6, 0.45
# A basis of more than this share of the space costs more than LAPACK.
SHARE = 0.75


@dataclass(frozen=True)
class Factorisation:
    """Components of one matrix.

    Attributes:
        energies: [n] squared singular values, float64, descending; n the smaller side, or less
            where only the leading ones were looked for.
        total: sum of all.
        squares: sum of the squares of all.
        complete: whether `energies` holds all of them.
        find: gives the [n, rank] orthonormal vectors of the leading components, on the smaller
            side.
        of_rows: whether the smaller side is the rows (else the columns).
        method: ``gram``, ``lanczos``, ``svd`` or ``guess`` and the dtype: ``gram float32``.
        uncertainty: absolute error that an energy may have.
    """

    energies: Tensor
    total: float
    squares: float
    complete: bool
    find: Callable[[int], Tensor]
    of_rows: bool
    method: str
    uncertainty: float

    def error(self, rank: int) -> float:
        """Relative Frobenius error of the best approximation of that rank, by the energies."""
        if not self.total:
            return 0.0
        rest = self.energies[rank:].sum() if self.complete else self._beyond(rank)
        return math.sqrt(max(float(rest), 0.0) / self.total)

    def _beyond(self, rank: int) -> float:
        return self.total - float(self.energies[:rank].sum())

    def basis(self, rank: int) -> Tensor:
        """[n, rank] orthonormal vectors of the leading components, on the smaller side.

        Raises:
            torch.linalg.LinAlgError: they could not be found.
        """
        return self.find(rank)

    def factors(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The two factors of the best approximation of that rank.

        The scale of each component is split evenly between the two.

        Args:
            matrix: [rows, columns], the one that was factorised.
            rank: 1 to n.

        Returns:
            [rows, rank] and [rank, columns], in the dtype of `matrix`.
        """
        basis = self.basis(rank).to(matrix.dtype)
        projected = basis.T @ matrix if self.of_rows else (matrix @ basis).T
        root = projected.norm(dim=1).sqrt()[:, None]
        other = projected / torch.where(root > 0, root, torch.ones_like(root))
        scaled = basis * root.T
        return (scaled, other) if self.of_rows else (other.T, scaled.T)


def factorise(matrix: Tensor, *, exact: bool = False) -> Factorisation:
    """Factorises a matrix.

    Args:
        matrix: [rows, columns], finite, float32 or float64.
        exact: begin with float64 even where the matrix is float32.

    Raises:
        torch.linalg.LinAlgError: even the float64 SVD did not converge.
    """
    first = torch.float64 if exact else matrix.dtype
    for dtype in dict.fromkeys((first, torch.float64)):
        found = _by_gram(matrix, dtype)
        if found is not None:
            return found
    return _by_svd(matrix)


class Sketch:
    """The components of a matrix: roughly at first, leading ones to full accuracy if asked for.

    Args:
        matrix: [rows, columns], finite, float32 or float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._side = _Side(matrix, matrix.dtype)
        self._gram: _Gram | None = None
        values = self._side.values
        self._basis = Lanczos(lambda block: values @ (values.T @ block), values)

    def guess(self) -> Factorisation | None:
        """What all energies are about, without vectors; None if they are too few to guess.

        The energies are made up; sums of many, and ranks, are right to a few percent.
        """
        if not self._basis.grow(COARSE * lanczos.BLOCK):
            return None
        energies = self._basis.spectrum() * self._side.scale**2
        return Factorisation(
            energies=energies,
            total=self._side.total,
            squares=float((energies**2).sum()),
            complete=True,
            find=_no_vectors,
            of_rows=self._side.of_rows,
            method=f"guess {_name(self._side.values.dtype)}",
            uncertainty=0.0,
        )

    def components(self, count: int) -> Factorisation | None:
        """The `count` leading components; None if that would not pay or does not stand checks.

        Raises:
            torch.linalg.LinAlgError: LAPACK did not converge.
        """
        if self._gram is None:
            # Many steps: the product is cheaper with the Gram matrix.
            self._gram = _Gram(self._side)
            self._basis.multiply = partial(torch.matmul, self._gram.values)
        gram, size = self._gram, FINE * count + STEPS * lanczos.BLOCK
        while size <= SHARE * len(gram.values) and self._basis.grow(int(size)):
            found = self._basis.solve(count)
            missing = found.excess(gram.trace) / PRECISION
            if missing <= 1:
                energies = found.values[:count] * gram.scale**2
                correction = float(found.corrections.max()) * gram.scale**2
                return Factorisation(
                    energies=energies,
                    total=gram.total,
                    squares=gram.squares,
                    complete=False,
                    find=partial(self._basis.vectors, found),
                    of_rows=gram.of_rows,
                    method=f"lanczos {_name(gram.values.dtype)}",
                    uncertainty=max(_rounding(energies, gram.values.dtype), correction),
                )
            size += max(DIGIT * math.log10(missing) * count, lanczos.BLOCK)
        return None


class _Side:
    """A matrix with the smaller side as rows.

    Attributes:
        values: [n, m], the matrix or its transpose divided by `scale`, so that squares neither
            overflow nor vanish.
        scale: largest absolute entry of the matrix.
        of_rows: whether the smaller side is the rows.
        total: sum of the squares of the matrix.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype) -> None:
        self.of_rows = matrix.shape[0] <= matrix.shape[1]
        side = matrix if self.of_rows else matrix.T
        self.scale = max(abs(float(end)) for end in side.aminmax()) or 1.0
        self.values = side.to(dtype) / self.scale
        self.total = _squares(self.values) * self.scale**2


class _Gram:
    """The Gram matrix of a matrix's smaller side.

    Attributes:
        values: [n, n], of the matrix divided by `scale`.
        scale: of the side.
        of_rows: whether the smaller side is the rows.
        trace: sum of the eigenvalues of `values`.
        total: the same of the matrix as it is.
        squares: sum of their squares.
    """

    def __init__(self, side: _Side) -> None:
        self.of_rows, self.scale, scaled = side.of_rows, side.scale, side.values
        size = len(scaled)
        self.values = scaled.new_empty(size, size)
        cuts = [size * part // GRAM_PARTS for part in range(GRAM_PARTS + 1)]
        for begin, end in pairwise(cuts):
            strip = scaled[begin:end] @ scaled[:end].T
            self.values[begin:end, :end] = strip
            self.values[:begin, begin:end] = strip[:, :begin].T
        self.trace = float(self.values.diagonal().double().sum())
        self.total = self.trace * self.scale**2
        self.squares = _squares(self.values) * self.scale**4


def _by_gram(matrix: Tensor, dtype: torch.dtype) -> Factorisation | None:
    """By the Gram matrix in `dtype`; None if the result does not stand its checks."""
    gram = _Gram(_Side(matrix, dtype))
    try:
        energies = torch.linalg.eigvalsh(gram.values).double().flip(0).clamp(min=0)
    except torch.linalg.LinAlgError:
        return None
    energies *= gram.scale**2
    # Sum and sum of squares of the eigenvalues are known without them.
    sound = (
        abs(float(energies.sum()) - gram.total) <= TOLERANCE * gram.total
        and abs(float((energies**2).sum()) - gram.squares) <= TOLERANCE * gram.squares
    )
    if not sound:
        return None
    return Factorisation(
        energies=energies,
        total=float(energies.sum()),
        squares=float((energies**2).sum()),
        complete=True,
        find=lambda rank: leading_vectors(gram.values, rank, PRECISION),
        of_rows=gram.of_rows,
        method=f"gram {_name(dtype)}",
        uncertainty=_rounding(energies, dtype),
    )


def _by_svd(matrix: Tensor) -> Factorisation:
    of_rows = matrix.shape[0] <= matrix.shape[1]
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    energies = values**2
    vectors = left if of_rows else right.T
    return Factorisation(
        energies=energies,
        total=float(energies.sum()),
        squares=float((energies**2).sum()),
        complete=True,
        find=lambda rank: vectors[:, :rank],
        of_rows=of_rows,
        method="svd float64",
        uncertainty=_rounding(energies, torch.float64),
    )


def _squares(values: Tensor) -> float:
    """Sum of the squares, added in float64 over the rows: several times as fast as in all."""
    return float((torch.linalg.vector_norm(values, dim=1).double() ** 2).sum())


def _no_vectors(rank: int) -> Tensor:
    raise RuntimeError("a guess has no vectors")


def _rounding(energies: Tensor, dtype: torch.dtype) -> float:
    return ROUNDING * torch.finfo(dtype).eps * float(energies[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
