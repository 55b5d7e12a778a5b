"""From the channels that a search keeps to the ratios of a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from amct_pytorch.algorithms.channel_choice import kept_of, shares
from amct_pytorch.config.prune_cfg import ChannelPlan
from amct_pytorch.config.prune_search_cfg import exact_ratio
from amct_pytorch.errors import ModelError, did_you_mean, shown
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.groups import Group
from amct_pytorch.graph.coupling.removal import positions_of


def lost_channels(
    masks: Any, channels: ChannelGraph, searched: Sequence[Group], who: str
) -> dict[str, int]:
    """How many channels each layer loses, by what a search algorithm returned.

    Args:
        masks: by layer name 1 (keep) or 0 (prune) for each channel.
        channels: of the network.
        searched: the groups that may lose some.
        who: the algorithm's name, for messages.

    Raises:
        ModelError: it is not what the algorithm should return.
    """
    names = [name for group in searched for name in group.names]
    if not isinstance(masks, Mapping):
        raise ModelError(f"{who} returned a {type(masks).__name__}; needed is a dict by layer name")
    lost = {}
    for name, mask in masks.items():
        if name not in names:
            raise ModelError(
                f"{who} returned {shown(name)}, which is no layer that is searched"
                f"{did_you_mean(str(name), names)}"
            )
        number = len(positions_of(channels, name))
        values = mask.tolist() if isinstance(mask, (np.ndarray, Tensor)) else list(mask)
        if len(values) != number or any(value not in (0, 1) for value in values):
            raise ModelError(
                f"{who}: {name} has {len(values)} values ({shown(values[:8])}); needed are "
                f"{number}, 1 (keep) or 0 (prune)"
            )
        lost[name] = number - int(sum(values))
        if lost[name] == number:
            raise ModelError(f"{who} takes all {number} channels of {name}; one has to stay")
    return lost


def plan_of(
    group: Group, lost: Mapping[str, int], ascend_optimized: bool, channels: ChannelGraph
) -> ChannelPlan | None:
    """The plan by which a group's layers lose as many channels as asked; None: none.

    Args:
        group: of coupled channels.
        lost: how many each layer loses, by name.
        ascend_optimized: whether numbers kept are rounded to multiples of 16 where that fits.
        channels: of the group's network.
    """
    wanted = {name: lost.get(name, 0) for name in group.names}
    if not any(wanted.values()):
        return None
    numbers = {name: len(positions_of(channels, name)) for name in group.names}
    parts = list(shares(group, channels.flow.sets, channels.flow.blocks))
    ratios = {exact_ratio(n, numbers[name]) for name, n in wanted.items() if n > 0}
    for share in parts:
        # What a share loses shows where it is a layer's only one.
        ratios |= {
            exact_ratio(gone, share.number)
            for gone in set(wanted.values())
            if 0 < gone < share.number
        }
    plans = [
        ChannelPlan(ratio, flag)
        for flag in ([True, False] if ascend_optimized else [False])
        for ratio in sorted(ratios)
    ]
    return min(plans, key=lambda plan: _difference(group, wanted, plan, channels))


def _difference(
    group: Group, wanted: Mapping[str, int], plan: ChannelPlan, channels: ChannelGraph
) -> int:
    """By how many channels, over the layers of a group, a plan misses what was wanted."""
    counts = dict.fromkeys(group.names, 0)
    for share in shares(group, channels.flow.sets, channels.flow.blocks):
        if share.multiple is None:
            continue
        kept = kept_of(share.number, plan.ratio, plan.ascend_optimized, share.multiple)
        first = share.parts[0][0]
        for name in group.names:
            if (positions_of(channels, name) == first).any():
                counts[name] += share.number - kept
    return sum(abs(counts[name] - wanted[name]) for name in group.names)
