"""A bounded sample of a layer's inputs, from every batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ITEMS = 512
ELEMENTS = 2**22


class InputSample:
    """Tokens or images at even distances, as many from each batch, the first among them.

    First tokens of sequences matter: language models put their largest activations there.

    Args:
        batches: how many batches there will be.
        dims: number of trailing axes that make up one item: 1 for tokens, 3 for images.
        items: how many are kept of all batches together; at least one of each.
        elements: how many numbers are kept at most, beyond one item of each batch.
    """

    def __init__(
        self, batches: int, dims: int = 1, *, items: int = ITEMS, elements: int = ELEMENTS
    ) -> None:
        self._batches, self._dims = batches, dims
        self._items, self._elements = items, elements
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Takes in one batch of at least `dims` dimensions; an empty one changes nothing."""
        if not x.numel():
            return
        shape = x.shape[x.dim() - self._dims :]
        items = x.detach().reshape(-1, *shape)
        limit = min(self._items, self._elements // math.prod(shape))
        quota = max(1, -(-limit // self._batches))
        step = max(1, len(items) // quota)
        # Cloned, or else the whole batch would stay in memory behind the view.
        self._kept.append(items[::step][:quota].float().clone())

    def items(self) -> list[Tensor]:
        """What was kept, float32 [items, …] each; items of one shape in one tensor."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for part in self._kept:
            by_shape.setdefault(part.shape[1:], []).append(part)
        return [torch.cat(parts) for parts in by_shape.values()]

    def tokens(self, features: int) -> Tensor:
        """What was kept of tokens, float32 [items, features]; no rows if there was none."""
        kept = self.items()
        return kept[0] if kept else torch.zeros(0, features)
