"""The second moments of a layer's inputs, which say what an error of its weights costs."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.algorithms.finite import is_finite
from amct_pytorch.errors import ArgumentValueError

# Rows of the matrix that one product fills. The matrix is symmetric: each strip is computed from
# its diagonal on, so narrow strips save up to half of the work; very narrow ones lose it again.
STRIP = 256
# Tokens whose products are summed in float32; sums of such sums are kept in float64.
CHUNK = 4096


class Hessian:
    """Mean of x xᵀ over the tokens of one layer input.

    For the squared output error of a linear layer this is half its Hessian in the weights of
    any one output channel (GPTQ, arXiv 2210.17323, "Background"); a constant factor changes
    nothing in what is solved with it. Layers that share an input share one such matrix.

    Products are computed in float32, CHUNK tokens at a time, and summed in float64, so the
    number of batches costs no precision. Each token counts once, however the batches are cut.

    Args:
        features: size K of the input's last axis.
        device: where the matrix is kept; inputs must be there too.

    Attributes:
        tokens: how many tokens have been counted.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=device)

    @property
    def features(self) -> int:
        """Size K of the inputs."""
        return len(self._sum)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Counts the tokens of one batch.

        Args:
            x: floating [..., K]; all axes but the last count tokens.
            mask: which tokens count, bool or numeric (nonzero counts), of the shape of `x`
                without its last axis or broadcastable to it; None: all. An attention mask
                [batch, sequence] leaves padding out.

        Raises:
            ArgumentValueError: if `x` or `mask` has another shape, or a token that counts is
                not finite.
        """
        if x.shape[-1:] != (self.features,):
            raise ArgumentValueError(
                f"x has shape {tuple(x.shape)}; its last axis must be {self.features}"
            )
        rows = x.detach().reshape(-1, self.features)
        if mask is not None:
            rows = rows[_selected(mask, x.shape[:-1])]
        if not is_finite(rows):
            raise ArgumentValueError("x holds NaN or infinity in a token that counts")
        for chunk in rows.split(CHUNK):
            self._add_rows(chunk.float())
        self.tokens += len(rows)

    def merge(self, other: Hessian) -> None:
        """Counts what another one has counted, such as another process's tokens."""
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def mean(self) -> Tensor:
        """The matrix, float32 [K, K], symmetric.

        Raises:
            ArgumentValueError: if no token has been counted.
        """
        if not self.tokens:
            raise ArgumentValueError("no token has been counted; add at least one batch first")
        mean = torch.empty(self._sum.shape, device=self._sum.device)
        for start in range(0, self.features, STRIP):
            stop = start + STRIP
            strip = (self._sum[start:stop, start:] / self.tokens).float().triu_()
            mean[start:stop, start:] = strip
            mean[start:, start:stop] = strip.T
            # Only upper triangles have been counted: the strip's own square is completed.
            square = strip[:, : len(strip)]
            mean[start:stop, start:stop] = square + square.triu(1).T
        return mean

    def _add_rows(self, rows: Tensor) -> None:
        for start in range(0, self.features, STRIP):
            self._sum[start : start + STRIP, start:] += (
                rows[:, start : start + STRIP].T @ rows[:, start:]
            )


def _selected(mask: Tensor, shape: torch.Size) -> Tensor:
    """`mask` as bool, one entry a token."""
    try:
        return (mask != 0).broadcast_to(shape).reshape(-1)
    except RuntimeError:
        raise ArgumentValueError(
            f"mask has shape {tuple(mask.shape)}; allowed is {tuple(shape)} or less, broadcast"
        ) from None
