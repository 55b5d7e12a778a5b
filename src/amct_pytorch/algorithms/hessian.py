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
        features: K.
        tokens: how many tokens have been counted.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.features = features
        self._device = torch.device(device)
        # Rows of each strip from the diagonal on, float64; none before the first token.
        self._strips: list[Tensor] = []

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
        for strip, more in zip(self._begun(), other._begun(), strict=True):
            strip += more.to(strip.device)
        self.tokens += other.tokens

    def mean(self) -> Tensor:
        """The matrix, float32 [K, K], symmetric.

        Raises:
            ArgumentValueError: if no token has been counted.
        """
        return self._mean(list(self._strips))

    def take_mean(self) -> Tensor:
        """The same; nothing is counted afterwards, and its memory is free."""
        strips, self._strips = self._strips, []
        mean = self._mean(strips)
        self.tokens = 0
        return mean

    def put_back(self, mean: Tensor, tokens: int) -> None:
        """Counts again what `take_mean` gave, of that many tokens."""
        for number, strip in enumerate(self._begun()):
            start = number * STRIP
            strip += mean[start : start + len(strip), start:].double() * tokens
        self.tokens += tokens

    def _mean(self, strips: list[Tensor]) -> Tensor:
        """Of strips, which are let go one by one."""
        if not self.tokens:
            raise ArgumentValueError("no token has been counted; add at least one batch first")
        mean = torch.empty(self.features, self.features, device=self._device)
        strips.reverse()
        for start in range(0, self.features, STRIP):
            strip = (strips.pop() / self.tokens).float().triu_()
            stop = start + len(strip)
            mean[start:stop, start:] = strip
            mean[start:, start:stop] = strip.T
            # Only upper triangles have been counted: the strip's own square is completed.
            square = strip[:, : len(strip)]
            mean[start:stop, start:stop] = square + square.triu(1).T
        return mean

    def _begun(self) -> list[Tensor]:
        """The strips, zeros where nothing has been counted."""
        if not self._strips:
            starts = range(0, self.features, STRIP)
            sizes = [(min(STRIP, self.features - start), self.features - start) for start in starts]
            self._strips = [
                torch.zeros(size, dtype=torch.float64, device=self._device) for size in sizes
            ]
        return self._strips

    def _add_rows(self, rows: Tensor) -> None:
        for number, strip in enumerate(self._begun()):
            start = number * STRIP
            strip += rows[:, start : start + len(strip)].T @ rows[:, start:]


def _selected(mask: Tensor, shape: torch.Size) -> Tensor:
    """`mask` as bool, one entry a token."""
    try:
        return (mask != 0).broadcast_to(shape).reshape(-1)
    except RuntimeError:
        raise ArgumentValueError(
            f"mask has shape {tuple(mask.shape)}; allowed is {tuple(shape)} or less, broadcast"
        ) from None
