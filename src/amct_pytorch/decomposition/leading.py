"""The leading eigenvectors of a symmetric matrix whose eigenvalues are known.

A full eigen-decomposition spends most of its time on vectors that a decomposition then drops.
With the eigenvalues at hand, a Chebyshev polynomial that is small on the unwanted ones and grows
fast beyond them turns a random block into the wanted subspace by a few matrix products (Y. Saad:
Numerical Methods for Large Eigenvalue Problems, chapters 5 and 7). A small eigenproblem in that
block finishes the work, and the energy it holds shows whether it succeeded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The block is so much wider than what is wanted: where the spectrum is dense, that is the gap.
OVERSAMPLING = 0.25
# How far the weakest wanted vector must outgrow all unwanted ones.
GAIN = 30.0
MAX_DEGREE = 14
# Growth within a block between two orthogonalisations that float32 digits can bear.
SPREAD = 1e4
# Share of the wanted energy that may be missed.
MISSED = 1e-5
# Below this size, or for more than this share of the vectors, LAPACK is faster.
SMALL = 2048
SHARE = 0.4


def leading_vectors(matrix: Tensor, values: Tensor, rank: int) -> Tensor:
    """Eigenvectors that go with the largest eigenvalues.

    Args:
        matrix: [n, n], symmetric, positive semi-definite.
        values: [n] all of its eigenvalues, descending.
        rank: how many vectors, 1 to n.

    Returns:
        [n, rank], orthonormal columns, leading first.

    Raises:
        torch.linalg.LinAlgError: LAPACK did not converge.
    """
    size = len(matrix)
    if size > SMALL and rank * (1 + OVERSAMPLING) <= SHARE * size:
        found = _filtered(matrix, values.double(), rank)
        if found is not None:
            return found
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors
    return vectors[:, size - rank :].flip(1)


def _filtered(matrix: Tensor, values: Tensor, rank: int) -> Tensor | None:
    """By a filtered random block; None if the block misses some of the energy."""
    width = rank + max(16, int(rank * OVERSAMPLING))
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(matrix), width, generator=generator).to(matrix)
    end = max(float(values[width]), 1e-6 * float(values[0]))  # of the unwanted eigenvalues
    for degree in _degrees(values, rank, end):
        block = torch.linalg.qr(_chebyshev(matrix, block, end, degree)).Q
    inner: tuple[Tensor, Tensor] = torch.linalg.eigh(block.T @ (matrix @ block))
    held = float(inner[0][width - rank :].double().sum())
    wanted = float(values[:rank].sum())
    if not abs(wanted - held) <= MISSED * wanted:
        return None
    return block @ inner[1][:, width - rank :].flip(1)


def _degrees(values: Tensor, rank: int, end: float) -> list[int]:
    """Degrees of the polynomials to apply in turn, with an orthogonalisation after each."""
    fastest, slowest = (math.acosh(max(2 * float(v) / end - 1, 1.0)) for v in values[[0, rank - 1]])
    each = max(1, min(MAX_DEGREE, int(math.log(SPREAD) / max(fastest - slowest, 1e-3))))
    degrees: list[int] = []
    gained = 0.0
    while gained < math.log(GAIN) and sum(degrees) < MAX_DEGREE:
        left = max(1, math.ceil((math.log(2 * GAIN) - gained) / max(slowest, 1e-3)))
        degrees.append(min(each, left, MAX_DEGREE - sum(degrees)))
        gained += degrees[-1] * slowest - math.log(2)
    return degrees


def _chebyshev(matrix: Tensor, block: Tensor, end: float, degree: int) -> Tensor:
    """The Chebyshev polynomial of `degree` on [0, end], of `matrix`, times `block`."""
    before, now = block, torch.addmm(block, matrix, block, beta=-1, alpha=2 / end)
    for _ in range(degree - 1):
        after = torch.addmm(now, matrix, now, beta=-2, alpha=4 / end).sub_(before)
        before, now = now, after
    return now
