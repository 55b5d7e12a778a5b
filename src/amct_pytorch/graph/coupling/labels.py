"""Labels of channels: which entries of which tensors are one channel.

Every entry of every tensor that a run passed on has a label, an integer: entries of the same
channel have the same one, 0 stands for entries that always stay. Label tensors have the shape
of what they describe, with stride 0 along the axes on which nothing changes, so that they cost
next to nothing and any operation that only moves data can be run on them as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

STAYS = 0


class ChannelSets:
    """Labels that have to stay or go together, and those that have to stay.

    A disjoint-set forest over all labels at once (Tarjan 1975), the smallest label of a set
    being its root.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._frozen: list[tuple[np.ndarray, str]] = []

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, number: int) -> np.ndarray:
        """`number` labels that nothing else has."""
        first = len(self._parent)
        fresh = np.arange(first, first + number)
        self._parent = np.concatenate([self._parent, fresh])
        return fresh

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """The root of the set of each label."""
        parents = self._parent
        found = np.asarray(parents[labels])
        while True:
            above = np.asarray(parents[found])
            if np.array_equal(above, found):
                return found
            found = above

    def tie(self, one: np.ndarray, other: np.ndarray, reason: str) -> None:
        """From now on the labels of each pair stay or go together.

        Args:
            one: labels.
            other: as many.
            reason: why a label has to stay whose partner always stays.
        """
        one, other = np.broadcast_arrays(one, other)
        one, other = one.ravel(), other.ravel()
        stays = (one == STAYS) | (other == STAYS)
        if stays.any():
            self.freeze(np.concatenate([one[stays], other[stays]]), reason)
        one, other = one[~stays], other[~stays]
        while True:
            one, other = self.roots(one), self.roots(other)
            apart = one != other
            if not apart.any():
                break
            low = np.minimum(one[apart], other[apart])
            high = np.maximum(one[apart], other[apart])
            np.minimum.at(self._parent, high, low)
        self._flatten()

    def _flatten(self) -> None:
        while True:
            above = self._parent[self._parent]
            if np.array_equal(above, self._parent):
                return
            self._parent = above

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """From now on these labels stay."""
        labels = np.unique(labels)
        labels = labels[labels != STAYS]
        if labels.size:
            self._frozen.append((labels, reason))

    def reasons(self) -> dict[int, str]:
        """Why each set that has to stay has to, by its root; the first reason counts."""
        found: dict[int, str] = {STAYS: "it always stays"}
        for labels, reason in self._frozen:
            for root in np.unique(self.roots(labels)).tolist():
                found.setdefault(root, reason)
        return found


def stays(shape: Iterable[int]) -> Tensor:
    """The labels of a tensor of which nothing ever goes."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def along(vector: np.ndarray, axis: int, shape: Iterable[int]) -> Tensor:
    """A label for each entry along one axis, the same on all others.

    Args:
        vector: [shape[axis]].
        axis: >= 0 or counted from behind.
        shape: of the result.
    """
    sizes = tuple(shape)
    ones = [1] * len(sizes)
    ones[axis] = -1
    return torch.tensor(vector, dtype=torch.int64).reshape(ones).expand(sizes)


def compact(labels: Tensor, sets: ChannelSets) -> Tensor:
    """Roots of labels, with stride 0 along each axis on which they do not change."""
    small = sets.roots(_narrowed(labels))
    for axis, size in enumerate(small.shape):
        if size > 1:
            first = small[(slice(None),) * axis + (slice(1),)]
            if (small == first).all():
                small = first
    return torch.from_numpy(small).expand(labels.shape)


def _narrowed(labels: Tensor) -> np.ndarray:
    """One entry along each axis of stride 0."""
    # Many small steps of numpy cost less than as many of torch.
    sizes = zip(labels.stride(), labels.shape, strict=True)
    found: np.ndarray = labels.numpy()[
        tuple(slice(1) if stride == 0 and size else slice(None) for stride, size in sizes)
    ]
    return found


def varying(labels: Tensor) -> list[int]:
    """The axes along which compact labels change."""
    return [
        axis for axis in range(labels.dim()) if labels.shape[axis] > 1 and labels.stride(axis) != 0
    ]


def carried(labels: Tensor) -> bool:
    """Whether any of the labels may go."""
    return bool((_narrowed(labels) != STAYS).any())


def all_of(labels: Tensor) -> np.ndarray:
    """Every label that is there, some of them more than once."""
    flat: np.ndarray = _narrowed(labels).ravel()
    return flat


def vector(labels: Tensor, axis: int, sets: ChannelSets, reason: str) -> np.ndarray:
    """One label for each entry along an axis; what differs on the other axes is tied.

    Args:
        labels: of any shape.
        axis: >= 0 or counted from behind.
        sets: that the labels are of.
        reason: see `ChannelSets.tie`.
    """
    size = labels.shape[axis]
    moved = compact(labels, sets).movedim(axis, 0)
    rows = _narrowed(moved)
    table = rows.reshape(rows.shape[0], -1)
    if table.shape[1] > 1:
        sets.tie(table[:, :1], table[:, 1:], reason)
    column: np.ndarray = sets.roots(table[:, 0])
    spread: np.ndarray = np.broadcast_to(column, (size,)).copy()
    return spread
