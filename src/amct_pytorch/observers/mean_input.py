"""The mean of a layer's input, one sum that batches and processes add up."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanInput:
    """The mean of a layer's input over all items of all batches.

    Spatial positions are kept apart, because padding makes borders see other weights; inputs
    of different sizes are summed separately.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, ...], Tensor] = {}
        self._items: dict[tuple[int, ...], int] = {}

    def update(self, x: Tensor, *, channels_last: bool) -> None:
        """Adds one batch.

        Args:
            x: [items, channels, ...], or [..., channels] where every leading axis counts
                items.
            channels_last: which of the two.
        """
        if channels_last:
            x = x.reshape(-1, x.shape[-1])
        if x.shape[0] == 0:
            return
        total = x.sum(0, keepdim=True, dtype=torch.float32)
        shape = tuple(total.shape)
        if shape in self._sums:
            self._sums[shape] += total
        else:
            self._sums[shape] = total
        self._items[shape] = self._items.get(shape, 0) + x.shape[0]

    def merge(self, other: MeanInput) -> None:
        """Adds what `other` has summed up."""
        for shape, total in other._sums.items():
            if shape in self._sums:
                self._sums[shape] += total.to(self._sums[shape].device)
            else:
                self._sums[shape] = total.clone()
            self._items[shape] = self._items.get(shape, 0) + other._items[shape]

    def means(self) -> list[tuple[Tensor, int]]:
        """Mean input [1, ...] and the number of items behind it, for each size seen."""
        return [
            (total / self._items[shape], self._items[shape]) for shape, total in self._sums.items()
        ]
