"""One thin factorisation of a matrix: energies of all components, vectors of the leading ones.

The components are the eigenvectors of the Gram matrix of the smaller side, an order of
magnitude cheaper than a singular value decomposition. Squaring halves the digits, which does no
harm here: small components are either dropped, or kept with their *orthonormal* vectors, which
lose nothing. What can go wrong is checked, and then done again in float64, and then by SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.decomposition.leading import leading_vectors

# Relative errors of a sound float32 eigen-decomposition are near 1e-6; this is far above.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Factorisation:
    """All components of one matrix.

    Attributes:
        energies: [n] squared singular values, float64, descending, n the smaller side.
        gram: [n, n] Gram matrix of the smaller side; or, if `solved`, the orthonormal vectors.
        solved: whether `gram` holds the vectors.
        scale: `gram` is that of the matrix divided by this.
        of_rows: whether the smaller side is the rows (else the columns).
        method: ``gram float32``, ``gram float64`` or ``svd float64``.
        uncertainty: absolute error that an energy may have.
    """

    energies: Tensor
    gram: Tensor
    solved: bool
    scale: float
    of_rows: bool
    method: str
    uncertainty: float

    def error(self, rank: int) -> float:
        """Relative Frobenius error of the best approximation of that rank, by the energies."""
        total = float(self.energies.sum())
        return (float(self.energies[rank:].sum()) / total) ** 0.5 if total else 0.0

    def basis(self, rank: int) -> Tensor:
        """[n, rank] orthonormal vectors of the leading components, on the smaller side.

        Raises:
            torch.linalg.LinAlgError: they could not be found.
        """
        if self.solved:
            return self.gram[:, :rank]
        return leading_vectors(self.gram, self.energies / self.scale**2, rank)

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
    of_rows = matrix.shape[0] <= matrix.shape[1]
    first = torch.float64 if exact else matrix.dtype
    for dtype in dict.fromkeys((first, torch.float64)):
        found = _by_gram(matrix, of_rows, dtype)
        if found is not None:
            return found
    return _by_svd(matrix, of_rows)


def _by_gram(matrix: Tensor, of_rows: bool, dtype: torch.dtype) -> Factorisation | None:
    """By the Gram matrix in `dtype`; None if the result does not stand its checks."""
    side = matrix if of_rows else matrix.T
    scale = float(side.abs().max()) or 1.0  # so that squares neither overflow nor vanish
    scaled = side.to(dtype) / scale
    gram = scaled @ scaled.T
    del scaled
    try:
        energies = torch.linalg.eigvalsh(gram).double().flip(0).clamp(min=0)
    except torch.linalg.LinAlgError:
        return None
    # Sum and sum of squares of the eigenvalues are known without them.
    trace = float(gram.diagonal().double().sum())
    squares = float(torch.linalg.vector_norm(gram, dtype=torch.float64)) ** 2
    sound = (
        abs(float(energies.sum()) - trace) <= TOLERANCE * trace
        and abs(float((energies**2).sum()) - squares) <= TOLERANCE * squares
    )
    if not sound:
        return None
    return Factorisation(
        energies=energies * scale**2,
        gram=gram,
        solved=False,
        scale=scale,
        of_rows=of_rows,
        method=f"gram {str(dtype).removeprefix('torch.')}",
        uncertainty=16 * torch.finfo(dtype).eps * float(energies[0]) * scale**2,
    )


def _by_svd(matrix: Tensor, of_rows: bool) -> Factorisation:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    energies = values**2
    eps = torch.finfo(torch.float64).eps
    return Factorisation(
        energies=energies,
        gram=left if of_rows else right.T,
        solved=True,
        scale=1.0,
        of_rows=of_rows,
        method="svd float64",
        uncertainty=16 * eps * float(energies[0]),
    )
