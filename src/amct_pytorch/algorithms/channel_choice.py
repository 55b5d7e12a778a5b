"""How many and which channels of a group go, for a ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
    for share in shares(group, sets, blocks):
        number, entries, parts = share.number, share.entries, share.parts
        if share.multiple is None:
            notes.append("its blocks have different numbers of channels")
            continue
        kept = kept_of(number, ratio, ascend_optimized, share.multiple)
        fewer = len(parts[0]) - kept // share.multiple
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


@dataclass(frozen=True)
class Share:
    """Channels of a group that the same layers make, which lose a ratio of their own.

    Attributes:
        parts: the channels, in parts that lose equally many.
        entries: channels of a layer for each channel of the group.
    """

    parts: tuple[np.ndarray, ...]
    entries: int

    @property
    def number(self) -> int:
        """Of them all, counted in channels of the layers."""
        return sum(map(len, self.parts)) * self.entries

    @property
    def multiple(self) -> int | None:
        """Of how many channels of a layer a multiple goes; None: the parts are not equal."""
        equal = len({len(part) for part in self.parts}) == 1
        return self.entries * len(self.parts) if equal else None


def shares(group: Group, sets: ChannelSets, blocks: Sequence[Blocks]) -> Iterator[Share]:
    """The channels of a group, by the layers that make them.

    Args:
        group: of coupled channels.
        sets: of the group's network.
        blocks: of the group's network.
    """
    made = _counts(group, [member.positions for member in group.producers])
    tables = _blocks_inside(group, sets, blocks)
    parted = _counts(group, [row for table in tables for row in table])
    for positions in _classes(made):
        parts = tuple(positions[part] for part in _classes(parted[positions]))
        yield Share(parts, int(made[positions[0]].max()))


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
    if (table == table[:1]).all():
        return [np.arange(len(table))]
    _, which = np.unique(table, axis=0, return_inverse=True)
    which = which.reshape(-1)
    order = dict.fromkeys(which.tolist())
    return [np.flatnonzero(which == one) for one in order]
