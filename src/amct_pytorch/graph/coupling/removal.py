"""Which channels of which layer go, told layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.groups import unequal_blocks

# The channels of each group that go, by the group's index, as bool for each channel.
Gone = Mapping[int, np.ndarray]


class UnfitRemovalError(ValueError):
    """Channels were named that cannot go, or not these alone."""


def gone_of_layers(graph: ChannelGraph, going: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """The channels of groups that go where layers say which of theirs do.

    Args:
        graph: the network's channels.
        going: for each layer, whether each of its output channels goes. Layers of a group that
            are not named go along.

    Raises:
        UnfitRemovalError: naming the layer and channels: it makes none that may go, it has
            another number, channels that hang together are not all named, all would go, or
            blocks that have to stay equal would not.
    """
    found: dict[int, np.ndarray] = {}
    for layer, mask in going.items():
        group = graph.group_of(layer)
        reason = graph.why_whole(layer)
        if not mask.any():
            continue
        if group is None or reason is not None:
            raise UnfitRemovalError(f"{layer}: none of its channels may go: {reason}")
        positions = positions_of(graph, layer)
        if len(positions) != len(mask):
            raise UnfitRemovalError(
                f"{layer}: it has {len(positions)} output channels, not {len(mask)}"
            )
        gone = found.setdefault(group.index, np.zeros(len(group), dtype=bool))
        gone[np.unique(positions[mask & (positions >= 0)])] = True
    for layer, mask in going.items():
        group = graph.group_of(layer)
        if group is None or group.index not in found:
            continue
        positions = positions_of(graph, layer)
        wanted = (positions >= 0) & found[group.index][positions]
        if (wanted != mask).any():
            channel = int(np.flatnonzero(wanted != mask)[0])
            together = np.flatnonzero(positions == positions[channel]).tolist()
            others = [name for name in group.names if name != layer]
            raise UnfitRemovalError(
                f"{layer}: channel {channel} hangs together with "
                + (f"channels {together} of its own" if len(together) > 1 else f"{others}")
                + ", and only some of them are to go"
            )
    for index, gone in found.items():
        group = graph.groups[index]
        staying = [at for at in np.flatnonzero(gone).tolist() if at in group.staying]
        if staying:
            raise UnfitRemovalError(
                f"{group.names[0]}: channel {staying[0]} has to stay: {group.staying[staying[0]]}"
            )
        for member in group.producers:
            if not (~gone[member.channels]).any():
                raise UnfitRemovalError(f"{member.slot.owner}: all of its channels would go")
        unequal = unequal_blocks(group, gone, graph.flow.sets, graph.flow.blocks)
        if unequal is not None:
            raise UnfitRemovalError(f"{group.names[0]}: {unequal}")
    return found


def positions_of(graph: ChannelGraph, layer: str) -> np.ndarray:
    """Which of its group's channels each output channel of a layer is.

    Args:
        graph: the network's channels.
        layer: one that makes channels.
    """
    group = graph.group_of(layer)
    assert group is not None
    return next(m.positions for m in group.producers if m.slot.owner == layer)
