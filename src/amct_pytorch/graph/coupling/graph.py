"""The channels of a network: groups, and what of them can be followed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from amct_pytorch.graph.coupling import (  # noqa: F401 (they register what functions do)
    rules_elementwise,
    rules_layers,
    rules_movement,
    rules_reduction,
)
from amct_pytorch.graph.coupling.groups import Group, find_groups
from amct_pytorch.graph.coupling.propagation import Propagation
from amct_pytorch.graph.coupling.slots import Role
from amct_pytorch.graph.look import shared_owners
from amct_pytorch.graph.trace import Trace


@dataclass(frozen=True)
class ChannelGraph:
    """What hangs together with what in one network.

    Attributes:
        groups: in the order in which the network makes their channels.
        flow: the run with the labels of everything in it.
        unfollowed: what could not be followed, with the reason, one text each.
        sizes: shape of each parameter and buffer.
        shared: why some of them cannot be cut.
        free: see `Propagation`.
        whole: see `Propagation`.
    """

    groups: tuple[Group, ...]
    flow: Propagation
    unfollowed: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    shared: Mapping[str, str]
    free: Mapping[int, int] = field(default_factory=dict)
    whole: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, trace: Trace) -> ChannelGraph:
        """The channels of a model that has been seen running.

        Args:
            model: the model.
            trace: of one run of it, in eval mode.
        """
        named = [*model.named_parameters(), *model.named_buffers()]
        sizes = {name: tuple(tensor.shape) for name, tensor in named}
        owners = shared_owners(model)
        shared = {
            name: f"reused layer: it shares memory with {owners[owner]!r}"
            for name in sizes
            if (owner := name.rpartition(".")[0]) in owners
        }
        return cls._followed(trace, sizes, shared, {}, {})

    @classmethod
    def _followed(
        cls,
        trace: Trace,
        sizes: Mapping[str, tuple[int, ...]],
        shared: Mapping[str, str],
        free: Mapping[int, int],
        whole: Mapping[int, str],
    ) -> ChannelGraph:
        flow = Propagation(trace, sizes, shared, free, whole)
        flow.run()
        groups = find_groups(flow.sets, flow.slots, flow.blocks)
        told = tuple(dict.fromkeys(reason for _, reason in flow.unfollowed))
        return cls(tuple(groups), flow, told, sizes, shared, free, whole)

    def without(self, call: int, reason: str) -> ChannelGraph:
        """The graph after a call turned out not to do with fewer channels what it was taken for.

        Where the call spreads channels over several axes, another of them is tried first.

        Args:
            call: index of the call.
            reason: what it did.
        """
        axes, axis = self.flow.joint.get(call, ([], -1))
        left = [other for other in axes if other != axis]
        free, whole = dict(self.free), dict(self.whole)
        if left and call not in free:
            free[call] = left[-1]
        else:
            whole[call] = reason
        return self._followed(self.flow.trace, self.sizes, self.shared, free, whole)

    def group_of(self, layer: str) -> Group | None:
        """The group of the channels that a layer makes; None if it makes none."""
        return next((group for group in self.groups if layer in group.names), None)

    def why_whole(self, layer: str) -> str | None:
        """Why none of the channels that a layer makes may go, or None."""
        group = self.group_of(layer)
        if group is not None:
            return group.reason
        for slot in self.flow.slots:
            if slot.owner == layer and slot.role is Role.FOLLOWS and slot.kind.startswith("Conv"):
                return "depthwise: it is pruned only together with the layer before it"
        for op, reason in self.flow.unfollowed:
            if layer in op.scopes:
                return reason
        return "its channels could not be followed"

    def alive(self, gone: Mapping[int, np.ndarray]) -> np.ndarray:
        """Whether each label stays.

        Args:
            gone: the channels that go, by index of their group, as bool for each channel.
        """
        sets = self.flow.sets
        staying = np.ones(len(sets), dtype=bool)
        for index, channels in gone.items():
            staying[self.groups[index].sets[channels]] = False
        kept: np.ndarray = staying[sets.roots(np.arange(len(sets)))]
        return kept

    def __str__(self) -> str:
        return "\n".join(map(str, self.groups))
