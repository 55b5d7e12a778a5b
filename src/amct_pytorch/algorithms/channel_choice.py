"""How many and which channels of a group go, for a ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from amct_pytorch.graph.coupling.groups import Group, balanced, unequal_blocks
from amct_pytorch.graph.coupling.labels import ChannelSets
from amct_pytorch.graph.coupling.slots import Blocks

# Numbers of channels that Ascend's matrix units take whole.
ASCEND = 16


@dataclass(frozen=True)
class Choice:
    """What becomes of a group's channels.

    Attributes:
        gone: whether each goes.
        notes: what kept others from going.
    """

    gone: np.ndarray
    notes: tuple[str, ...] = ()


def kept_of(number: int, ratio: float, ascend_optimized: bool, multiple: int = 1) -> int:
    """How many of so many channels stay: number − round(number · ratio), at least one.

    Args:
        number: of channels.
        ratio: share that goes.
        ascend_optimized: whether to round what stays up to a multiple of 16.
        multiple: of which it has to be one.
    """
    kept = max(number - round(number * ratio), 1)
    step = math.lcm(multiple, ASCEND if ascend_optimized else 1)
    return min(-(-kept // step) * step, number)


def choose(
    group: Group,
    scores: np.ndarray,
    ratio: float,
    ascend_optimized: bool,
    sets: ChannelSets,
    blocks: Sequence[Blocks],
) -> Choice:
    """The channels of a group that go.

    Channels that different layers make (one behind the other in a concatenation) are counted
    apart, so that each layer loses its share. Blocks of channels that have to keep equal numbers
    lose equally many.

    Args:
        group: of coupled channels.
        scores: how much each counts.
        ratio: share that goes.
        ascend_optimized: see `kept_of`.
        sets: of the group's network.
        blocks: of the group's network.
    """
    gone = np.zeros(len(group), dtype=bool)
    if group.reason is not None:
        return Choice(gone, (group.reason,))
    notes: list[str] = []
    made = _counts(group, [member.positions for member in group.producers])
    tables = _blocks_inside(group, sets, blocks)
    parted = _counts(group, [row for table in tables for row in table])
    for positions in _classes(made):
        entries = int(made[positions[0]].max())
        parts = [positions[part] for part in _classes(parted[positions])]
        sizes = {len(part) for part in parts}
        if len(sizes) > 1:
            notes.append("its blocks have different numbers of channels")
            continue
        size = sizes.pop()
        number = len(positions) * entries
        kept = kept_of(number, ratio, ascend_optimized, entries * len(parts))
        fewer = size - kept // (entries * len(parts))
        plain = kept_of(number, ratio, False)
        if fewer == 0 and plain < number:
            why = "to a multiple of 16" if ascend_optimized else f"to {len(parts)} equal blocks"
            notes.append(f"{plain} of {number} channels would stay; rounded up {why} all do")
        able = [part[group.prunable[part]] for part in parts]
        most = min(len(part) for part in able)
        if most < fewer:
            notes.append(
                f"only {most * len(parts) * entries} of {number} channels may go: "
                f"{next(iter(group.staying.values()))}"
            )
            fewer = most
        for part in able:
            gone[part[np.argsort(scores[part], kind="stable")[:fewer]]] = True
    unequal = unequal_blocks(group, gone, sets, blocks)
    if unequal is not None:
        return Choice(np.zeros(len(group), dtype=bool), (unequal,))
    return Choice(gone, tuple(dict.fromkeys(notes)))


def _counts(group: Group, members: Iterable[np.ndarray]) -> np.ndarray:
    """How many entries of each member each channel has, [channels, members]."""
    columns = [
        np.bincount(positions[positions >= 0], minlength=len(group)) for positions in members
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((len(group), 0), dtype=np.int64)


def _blocks_inside(
    group: Group, sets: ChannelSets, blocks: Iterable[Blocks]
) -> Iterable[np.ndarray]:
    """Of each unbalanced set of blocks that touches the group: positions, [blocks, channels]."""
    position = {root: at for at, root in enumerate(group.sets.tolist())}
    for block in blocks:
        roots = sets.roots(block.labels)
        if balanced(roots, block.number):
            continue
        table = np.array([position.get(root, -1) for root in roots.tolist()])
        if (table >= 0).any():
            yield table.reshape(block.number, -1)


def _classes(table: np.ndarray) -> list[np.ndarray]:
    """Indices of equal rows, classes in the order of their first row."""
    if table.shape[1] == 0:
        return [np.arange(len(table))]
    _, which = np.unique(table, axis=0, return_inverse=True)
    which = which.reshape(-1)
    order = dict.fromkeys(which.tolist())
    return [np.flatnonzero(which == one) for one in order]
