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
from amct_pytorch.graph.coupling.branches import freeze_branches, idle_layers
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
        idle: modules with weights of their own that did not run.
        training: whether the run was in training mode.
        free: see `Propagation`.
        whole: see `Propagation`.
    """

    groups: tuple[Group, ...]
    flow: Propagation
    unfollowed: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    shared: Mapping[str, str]
    idle: tuple[str, ...] = ()
    training: bool = False
    free: Mapping[int, int] = field(default_factory=dict)
    whole: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, trace: Trace, training: bool = False) -> ChannelGraph:
        """The channels of a model that has been seen running.

        Args:
            model: the model.
            trace: of one run of it.
            training: whether that was in training mode.
        """
        named = [*model.named_parameters(), *model.named_buffers()]
        sizes = {name: tuple(tensor.shape) for name, tensor in named}
        owners = shared_owners(model)
        shared = {
            name: f"reused layer: it shares memory with {owners[owner]!r}"
            for name in sizes
            if (owner := name.rpartition(".")[0]) in owners
        }
        return cls._followed(trace, sizes, shared, idle_layers(model, trace), training, {}, {})

    @classmethod
    def _followed(
        cls,
        trace: Trace,
        sizes: Mapping[str, tuple[int, ...]],
        shared: Mapping[str, str],
        idle: tuple[str, ...],
        training: bool,
        free: Mapping[int, int],
        whole: Mapping[int, str],
    ) -> ChannelGraph:
        flow = Propagation(trace, sizes, shared, free, whole)
        flow.run()
        freeze_branches(flow, idle)
        groups = find_groups(flow.sets, flow.slots, flow.blocks)
        told = tuple(dict.fromkeys(reason for _, reason in flow.unfollowed))
        return cls(tuple(groups), flow, told, sizes, shared, idle, training, free, whole)

    def without(self, call: int, reason: str) -> ChannelGraph:
        """The graph after a call turned out not to do with fewer channels what it was taken for.

        Where the call spreads channels over several axes, another of them is tried first.

        Args:
            call: index of the call.
            reason: what it did.
        """
        free, whole = dict(self.free), dict(self.whole)
        joint = self.flow.joint
        if call in joint and call not in free:
            axes, axis = joint[call]
            other = [one for one in axes if one != axis][-1]
            free.update(dict.fromkeys(self._alike(call), other))
        elif call in joint:
            whole.update(dict.fromkeys(self._alike(call), reason))
        elif call in whole:
            # It is not what goes into it alone that counts: a branch that depends on values.
            whole.update(dict.fromkeys(range(call + 1), reason))
        else:
            whole[call] = reason
        return self._followed(
            self.flow.trace, self.sizes, self.shared, self.idle, self.training, free, whole
        )

    def _alike(self, call: int) -> list[int]:
        """The calls of one module that spread channels over the same axes, as it does for heads."""
        ops, joint = self.flow.trace.ops, self.flow.joint
        return [
            other
            for other, (axes, _) in joint.items()
            if axes == joint[call][0]
            and ops[other].function == ops[call].function
            and ops[other].scopes == ops[call].scopes
        ]

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
        if layer in self.idle:
            return "it did not run on input_data"
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
