"""Groups of channels: what is pruned together, and where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from amct_pytorch.graph.coupling.labels import STAYS, ChannelSets
from amct_pytorch.graph.coupling.slots import BARE, Blocks, Role, Slot


@dataclass(frozen=True)
class Member:
    """One axis of one weight, as a group sees it.

    Attributes:
        slot: where it is.
        positions: which of the group's channels each entry along the axis belongs to; -1 for
            entries that belong to another group or to none.
    """

    slot: Slot
    positions: np.ndarray

    @cached_property
    def channels(self) -> np.ndarray:
        """The group's channels that it has a part of, in rising order."""
        return np.unique(self.positions[self.positions >= 0])

    @property
    def begin(self) -> int:
        """First of the group's channels that it has a part of."""
        return int(self.channels[0])

    @property
    def end(self) -> int:
        """One behind the last of them."""
        return int(self.channels[-1]) + 1

    def __str__(self) -> str:
        slot = self.slot
        name = slot.tensor or slot.owner
        count = np.bincount(self.positions[self.positions >= 0])
        entries = "" if count.max() == 1 else f", up to {count.max()} entries each"
        axis = f" axis {slot.axis}" if slot.tensor else ""
        groups = f" of {slot.groups} groups" if slot.groups > 1 else ""
        where = f"{name}{axis}{groups}"
        return f"{slot.role.value:9} {where:40} {slot.kind}, channels {_ranges(self)}{entries}"


@dataclass(frozen=True)
class Group:
    """Channels that one or several layers make together, and everything that follows them.

    Attributes:
        index: position among the groups, in the order in which the network makes them.
        sets: root of each channel's set of labels.
        members: in the order of the run, producers first.
        staying: why a channel has to stay, by channel.
    """

    index: int
    sets: np.ndarray
    members: tuple[Member, ...]
    staying: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def producers(self) -> list[Member]:
        """The layers that make the channels."""
        return [member for member in self.members if member.slot.role is Role.MAKES]

    @property
    def consumers(self) -> list[Member]:
        """What follows or takes them."""
        return [member for member in self.members if member.slot.role is not Role.MAKES]

    @property
    def names(self) -> list[str]:
        """Names of the layers that make the channels."""
        return list(dict.fromkeys(member.slot.owner for member in self.producers))

    @property
    def followers(self) -> list[str]:
        """Names of the layers, and of bare weights, that follow or take them."""
        found = [m.slot.tensor if m.slot.kind == BARE else m.slot.owner for m in self.consumers]
        return [name for name in dict.fromkeys(found) if name not in self.names]

    @property
    def prunable(self) -> np.ndarray:
        """Whether each channel may go."""
        able = np.ones(len(self), dtype=bool)
        able[list(self.staying)] = False
        return able

    @property
    def reason(self) -> str | None:
        """Why no channel at all may go, or None."""
        if len(self) == 1:
            single = max(len(member.positions) for member in self.producers) == 1
            return "it has one channel" if single else "all its channels hang together"
        if self.prunable.any():
            return None
        return next(iter(self.staying.values()))

    def __str__(self) -> str:
        lines = [f"group {self.index}: {len(self)} channels of {', '.join(self.names)}"]
        lines += [f"  {member}" for member in self.members]
        if self.reason is not None:
            lines.append(f"  stays whole: {self.reason}")
        elif self.staying:
            first = next(iter(self.staying.values()))
            lines.append(f"  {len(self.staying)} of the channels stay: {first}")
        return "\n".join(lines)


def _ranges(member: Member) -> str:
    """``0-15, 32-47``: the channels as ranges."""
    channels = member.channels
    cuts = np.flatnonzero(np.diff(channels) > 1) + 1
    runs = np.split(channels, cuts)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:4]]
    return ", ".join(texts) + (", …" if len(runs) > 4 else "")


def find_groups(sets: ChannelSets, slots: Sequence[Slot], blocks: Iterable[Blocks]) -> list[Group]:
    """The groups of a network, in the order in which it makes them.

    Channels are in one group if one layer makes both, if they hang together, or if they have to
    keep equal numbers.

    Args:
        sets: of labels.
        slots: where they lie.
        blocks: what has to keep equal numbers.
    """
    reasons = sets.reasons()
    groups = ChannelSets()
    groups.new(len(sets) - 1)
    rooted = [(slot, sets.roots(slot.labels)) for slot in slots]
    made = [(slot, roots) for slot, roots in rooted if slot.role is Role.MAKES]
    for _, roots in made:
        _join(groups, roots)
    for block in blocks:
        roots = sets.roots(block.labels)
        if not balanced(roots, block.number):
            _join(groups, roots)
    home = groups.roots(np.arange(len(sets)))
    by_group: dict[int, list[tuple[Slot, np.ndarray]]] = {}
    for slot, roots in made:
        by_group.setdefault(int(home[roots[0]]), []).append((slot, roots))
    position = np.full(len(sets), -1, dtype=np.int64)
    orders = []
    for rooted_here in by_group.values():
        # The largest layer's channels come first, in its order.
        order = np.concatenate(
            [roots for _, roots in sorted(rooted_here, key=lambda one: -len(one[1]))]
        )
        _, first = np.unique(order, return_index=True)
        orders.append(order[np.sort(first)])
        position[orders[-1]] = np.arange(len(orders[-1]))
    inside: dict[int, list[Member]] = {group: [] for group in by_group}
    for slot, roots in rooted:
        homes = home[roots]
        for group in np.unique(homes).tolist():
            if group in inside:
                inside[group].append(Member(slot, np.where(homes == group, position[roots], -1)))
    found: list[Group] = []
    for index, (group, order) in enumerate(zip(by_group, orders, strict=True)):
        own = sorted(inside[group], key=lambda m: (m.slot.role is not Role.MAKES, m.slot.call))
        staying = {at: reasons[root] for at, root in enumerate(order.tolist()) if root in reasons}
        found.append(Group(index, order, tuple(own), staying))
    return found


def _join(groups: ChannelSets, roots: np.ndarray) -> None:
    roots = roots[roots != STAYS]
    if roots.size:
        groups.tie(roots[:1], roots[1:], "")


def balanced(roots: np.ndarray, number: int) -> bool:
    """Whether each set has as many channels in one block as in any other."""
    table = np.sort(roots.reshape(number, -1), axis=1)
    return bool((table == table[0]).all())


def unequal_blocks(
    group: Group, gone: np.ndarray, sets: ChannelSets, blocks: Iterable[Blocks]
) -> str | None:
    """Why these channels cannot go together: blocks would be left with unequal numbers.

    Args:
        group: of coupled channels.
        gone: whether each goes.
        sets: of the group's network.
        blocks: of the group's network.
    """
    for block in blocks:
        roots = sets.roots(block.labels)
        left = (~np.isin(roots, group.sets[gone])).reshape(block.number, -1).sum(axis=1)
        if (left != left[0]).any():
            return f"{block.where} needs equal numbers of channels in {block.number} blocks"
    return None
