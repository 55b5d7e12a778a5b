"""A bounded sample of a layer's input tokens, from every batch."""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS = 512


class TokenSample:
    """Tokens at even distances, as many from each batch, the first of each batch among them.

    The first tokens of sequences matter: language models put their largest activations there.

    Args:
        batches: how many batches there will be.
        tokens: how many tokens are kept of all batches together; at least one of each.
    """

    def __init__(self, batches: int, tokens: int = TOKENS) -> None:
        self._quota = max(1, -(-tokens // batches))
        self._rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Takes in one batch [..., K]; an empty one changes nothing."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows):
            step = max(1, len(rows) // self._quota)
            # Cloned, or else the whole batch would stay in memory behind the view.
            self._rows.append(rows[::step][: self._quota].float().clone())

    def rows(self, features: int) -> Tensor:
        """What was kept, float32 [tokens, features]; no rows if there was no token."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, features)
