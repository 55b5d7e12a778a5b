"""What sensitivities and search algorithms are told of a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from amct_pytorch.algorithms.balanced_l2_norm import NO_WEIGHTS
from amct_pytorch.algorithms.channel_choice import shares
from amct_pytorch.graph.costs import layer_macs
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.groups import Group, Member
from amct_pytorch.graph.coupling.removal import positions_of
from amct_pytorch.graph.coupling.slots import Role
from amct_pytorch.graph.trace import Trace
from amct_pytorch.proto import PruneRecord
from amct_pytorch.record.attributes import set_int, set_ints
from amct_pytorch.record.prune_groups import prune_records


@dataclass(frozen=True)
class SearchGraph:
    """The network that is searched.

    Attributes:
        model: a copy of the user's model, in eval mode.
        channels: which channels of it hang together; `print` it.
    """

    model: nn.Module
    channels: ChannelGraph


def bit_operations(model: nn.Module, trace: Trace) -> dict[str, int]:
    """FLOPs × bits of the weights × bits of the inputs, of each layer of a run.

    FLOPs are twice the multiply-accumulates; bits are those of the layer's type, so that a
    float32 layer counts 32 · 32.
    """
    found = {}
    for name, macs in layer_macs(trace).items():
        weight = getattr(model.get_submodule(name), "weight", None)
        bits = 8 * weight.element_size() if isinstance(weight, Tensor) else 32
        found[name] = 2 * macs * bits * bits
    return found


def graph_info(model: nn.Module, trace: Trace, original: nn.Module) -> dict[str, dict[str, int]]:
    """`cin`, `cout`, `ori_cout` and `bitops` of each layer, by name in the order of the run.

    Args:
        model: the network as it is, channels that are settled gone.
        trace: of a run of it.
        original: the user's network.
    """
    found = {}
    for name, bitops in bit_operations(model, trace).items():
        cin, cout = _channels(model.get_submodule(name))
        found[name] = {
            "cin": cin,
            "cout": cout,
            "ori_cout": _channels(original.get_submodule(name))[1],
            "bitops": bitops,
        }
    return found


def _channels(module: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer; 0 where a module does not say."""
    cin = getattr(module, "in_channels", getattr(module, "in_features", 0))
    cout = getattr(module, "out_channels", getattr(module, "out_features", 0))
    return int(cin), int(cout)


def search_records(channels: ChannelGraph, groups: Iterable[Group]) -> list[PruneRecord]:
    """One record for each group that is searched.

    Beside what stands in a record file, nodes say which channels they have; see
    `SearchChannelBase`.

    Args:
        channels: of the network.
        groups: of them, those whose channels may go.
    """
    found = []
    for group in groups:
        (record,) = prune_records([group], {})
        _tell_channels(record, group, channels)
        found.append(record)
    return found


def _tell_channels(record: PruneRecord, group: Group, channels: ChannelGraph) -> None:
    multiple = np.ones(len(group), dtype=np.int64)
    stays = ~group.prunable
    for share in shares(group, channels.flow.sets, channels.flow.blocks):
        for part in share.parts:
            multiple[part] = share.multiple or 1
            stays[part] |= share.multiple is None
    for node in record.producer:
        at = positions_of(channels, node.name)
        set_ints(node, "channels", at.tolist())
        set_ints(node, "multiple", np.where(at >= 0, multiple[at], 1).tolist())
        set_ints(node, "stays", np.where(at >= 0, stays[at], True).astype(int).tolist())
    for node in record.consumer:
        weights = [m for m in group.consumers if m.slot.owner == node.name and _is_weight(m)]
        if weights:
            set_ints(node, "channels", weights[0].positions.tolist())
            if weights[0].slot.role is Role.FOLLOWS:
                set_int(node, "follows", 1)


def _is_weight(member: Member) -> bool:
    """Whether it is an axis of what a layer multiplies by."""
    name = member.slot.tensor.rpartition(".")[2]
    return bool(name) and name not in NO_WEIGHTS
