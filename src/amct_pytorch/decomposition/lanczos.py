"""Leading eigenpairs of a symmetric matrix when a good share of all of them is wanted.

Block Lanczos with full orthogonalisation (G. H. Golub, R. Underwood: The block Lanczos method,
1977; Y. Saad: Numerical Methods for Large Eigenvalue Problems, chapter 6). A basis of about two
and a half times as many vectors as are wanted holds them to float32 accuracy; everything but one
eigenproblem of that size is matrix products, several times cheaper than LAPACK's full one.

A few steps of the same already tell how *all* eigenvalues are distributed (G. H. Golub,
G. Meurant: Matrices, Moments and Quadrature with Applications, 2010, chapters 6 and 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

BLOCK = 32
# Below this share of the first block's size a new block has directions made of rounding alone.
BREAKDOWN = 1e-5
# Below this size, or for more than this share of the vectors, LAPACK is faster; and the width of
# a basis that nearly always holds the vectors, in their number.
SMALL = 1024
LARGEST_SHARE = 0.25
WIDTH = 2.8


@dataclass(frozen=True)
class Ritz:
    """What a basis knows about the leading eigenpairs.

    Attributes:
        values: [m] Ritz values, float64, descending; never above the eigenvalues.
        weights: [m, rank] the leading vectors in terms of the basis.
        corrections: [rank] how far below the eigenvalues the leading values are, to second order.
    """

    values: Tensor
    weights: Tensor
    corrections: Tensor

    def excess(self, trace: float) -> float:
        """By how much the relative error is larger than with the eigenvectors themselves.

        Args:
            trace: of the matrix: the sum of all eigenvalues.
        """
        missed = float(self.corrections.sum())
        rest = trace - float(self.values[: len(self.corrections)].sum())
        best = max(rest - missed, 0.0)
        return math.sqrt(max(rest, 0.0) / trace) - math.sqrt(best / trace)


class Lanczos:
    """A growing orthonormal basis of a Krylov space.

    Args:
        multiply: the product of a symmetric, positive semi-definite matrix [n, n] with [n, k].
        vectors: [n, any], of the device and dtype to work with; only these and n are looked at.

    Attributes:
        multiply: may be exchanged for another way to multiply with the same matrix.
    """

    def __init__(self, multiply: Callable[[Tensor], Tensor], vectors: Tensor) -> None:
        self.multiply = multiply
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(vectors), BLOCK, generator=generator).to(vectors)
        self._next = torch.linalg.qr(start).Q
        self._basis = vectors.new_empty(0, len(vectors))  # one vector a row
        self._inner = vectors.new_zeros(0, 0)
        self._coupling = vectors.new_zeros(BLOCK, BLOCK)
        self._largest = 0.0

    @property
    def size(self) -> int:
        """Vectors in the basis."""
        return len(self._basis)

    def grow(self, size: int) -> bool:
        """Grows the basis to `size` vectors or a few more.

        Returns:
            Whether it could: not if the space is exhausted, or would be nearly the whole one.
        """
        steps = -(-(size - self.size) // BLOCK)
        if steps <= 0:
            return True
        old, new = self.size, self.size + steps * BLOCK
        length = len(self._next)
        if new > length - BLOCK:
            return False
        basis = self._basis.new_empty(new, length)
        basis[:old] = self._basis
        inner = self._inner.new_zeros(new, new)
        inner[:old, :old] = self._inner
        for end in range(old + BLOCK, new + 1, BLOCK):
            begin = end - BLOCK
            block = self._next
            basis[begin:end] = block.T
            image = self.multiply(block)
            if begin:
                # The three-term recurrence first: what is left to remove is rounding alone.
                inner[begin:end, begin - BLOCK : begin] = self._coupling
                inner[begin - BLOCK : begin, begin:end] = self._coupling.T
                image -= basis[begin - BLOCK : begin].T @ self._coupling.T
            own = block.T @ image
            inner[begin:end, begin:end] = (own + own.T) / 2
            image -= block @ own
            image -= basis[:end].T @ (basis[:end] @ image)
            self._next, self._coupling = torch.linalg.qr(image)
            sizes = self._coupling.diagonal().abs()
            self._largest = max(self._largest, float(sizes.max()))
            if float(sizes.min()) <= BREAKDOWN * self._largest:
                return False
        self._basis, self._inner = basis, inner
        return True

    def solve(self, rank: int) -> Ritz:
        """The leading `rank` Ritz pairs, rank well below `size`.

        Raises:
            torch.linalg.LinAlgError: LAPACK did not converge.
        """
        values, vectors = torch.linalg.eigh(self._inner)
        values, weights = values.double().flip(0), vectors[:, -rank:].flip(1)
        residuals = ((self._coupling @ weights[-BLOCK:]).double() ** 2).sum(0)
        # The weakest wanted pair against the strongest that is not: Kato's bound, with the
        # Ritz value some way below in place of the unknown eigenvalue.
        below = values[min(len(values) - 1, rank + rank // 5)]
        gaps = (values[:rank] - below).clamp(min=1e-12 * float(values[0]))
        return Ritz(values, weights, residuals / gaps)

    def spectrum(self) -> Tensor:
        """All n eigenvalues as the basis guesses them, float64, descending.

        The first block is a random subspace; by block Gauss quadrature each Ritz value stands
        for as many eigenvalues as its vector's share of that block. Sums over many eigenvalues
        are right to a few percent from six steps on, the better the more there are.
        """
        values, vectors = torch.linalg.eigh(self._inner.double())
        values = values.flip(0).clamp(min=0)
        length = len(self._next)
        counts = (vectors[:BLOCK] ** 2).sum(0).flip(0) * (length / BLOCK)
        # A Ritz value is at the middle of those that it stands for.
        middles = counts.cumsum(0) - counts / 2
        places = torch.arange(length).to(middles) + 0.5
        after = torch.searchsorted(middles, places).clamp(1, len(middles) - 1)
        steps = (middles[after] - middles[after - 1]).clamp(min=1e-12)
        share = ((places - middles[after - 1]) / steps).clamp(0, 1)
        return torch.lerp(values[after - 1], values[after], share)

    def vectors(self, ritz: Ritz, rank: int) -> Tensor:
        """[n, rank] the leading Ritz vectors, orthonormal."""
        return self._basis.T @ ritz.weights[:, :rank]


def leading_vectors(matrix: Tensor, rank: int, precision: float) -> Tensor:
    """Eigenvectors that go with the largest eigenvalues.

    Args:
        matrix: [n, n], symmetric, positive semi-definite.
        rank: how many vectors, 1 to n.
        precision: by how much they may raise the relative error of what is kept.

    Returns:
        [n, rank], orthonormal columns, leading first.

    Raises:
        torch.linalg.LinAlgError: LAPACK did not converge.
    """
    size = len(matrix)
    if size > SMALL and rank <= LARGEST_SHARE * size:
        basis = Lanczos(partial(torch.matmul, matrix), matrix)
        if basis.grow(int(WIDTH * rank)):
            found = basis.solve(rank)
            if found.excess(float(matrix.diagonal().double().sum())) <= precision:
                return basis.vectors(found, rank)
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors
    return vectors[:, size - rank :].flip(1)
