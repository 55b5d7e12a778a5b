"""Channel pruning in the record file: the groups of coupled channels, and what went of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from amct_pytorch.errors import RecordError, did_you_mean, shown
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.groups import Group, Member
from amct_pytorch.graph.coupling.removal import UnfitRemovalError, gone_of_layers
from amct_pytorch.graph.coupling.slots import BARE, Role
from amct_pytorch.proto import PruneNode, PruneRecord
from amct_pytorch.record.attributes import attribute, set_int, set_ints, set_string
from amct_pytorch.record.record_file import RecordFile

# Types that other writers give, by the ONNX type.
OTHER_TYPES = {
    "Conv1d": "Conv",
    "Conv2d": "Conv",
    "Conv3d": "Conv",
    "ConvTranspose1d": "ConvTranspose",
    "ConvTranspose2d": "ConvTranspose",
    "ConvTranspose3d": "ConvTranspose",
    "Linear": "Gemm",
    "InnerProduct": "Gemm",
    "MatMul": "Gemm",
    "FusedBatchNorm": "BatchNormalization",
    "FusedBatchNormV3": "BatchNormalization",
    "BatchNorm": "BatchNormalization",
    "BatchNorm2d": "BatchNormalization",
    "PReLU": "PRelu",
}


def prune_records(groups: Iterable[Group], gone: Mapping[int, np.ndarray]) -> list[PruneRecord]:
    """One message for each group of which channels may go.

    Args:
        groups: of a network.
        gone: which channels of each go, by its index.
    """
    records = []
    for group in groups:
        if group.reason is not None:
            continue
        record = PruneRecord()
        for node, members in _nodes(record.producer, group.producers):
            lost = np.zeros(len(members[0].positions), dtype=bool)
            if group.index in gone:
                positions = members[0].positions
                lost = (positions >= 0) & gone[group.index][positions]
            if lost.any():
                set_ints(node, "prune_index", np.flatnonzero(lost).tolist())
        _nodes(record.consumer, group.consumers, skip=group.names)
        records.append(record)
    return records


def _nodes(
    field: Iterable[PruneNode], members: Sequence[Member], skip: Sequence[str] = ()
) -> list[tuple[PruneNode, list[Member]]]:
    """Adds a node for each module among the members, in their order."""
    by_name: dict[str, list[Member]] = {}
    for member in members:
        slot = member.slot
        if slot.role is Role.FOLLOWS and slot.owner in skip:
            continue  # the bias of a layer that makes the channels
        name = slot.tensor if slot.kind == BARE else slot.owner
        by_name.setdefault(name, []).append(member)
    found = []
    for name, own in by_name.items():
        node = field.add(name=name)  # type: ignore[attr-defined]
        slot = own[0].slot
        set_string(node, "type", slot.kind)
        set_int(node, "begin", min(member.begin for member in own))
        set_int(node, "end", max(member.end for member in own))
        if slot.kind in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            set_int(node, "prune_axis", slot.axis)
            if slot.groups > 1:
                set_int(node, "group", slot.groups)
        found.append((node, own))
    return found


def has_channels(record: RecordFile) -> bool:
    """Whether the record is one of channel pruning."""
    return any(entry.producer for entry in record.message.prune_record)


def gone_of_record(record: RecordFile, graph: ChannelGraph) -> dict[int, np.ndarray]:
    """The channels that a record takes out of a network.

    Args:
        record: written for a network of the same structure.
        graph: the network's channels.

    Raises:
        RecordError: naming the first difference between the network and the record's.
    """
    source = record.source or "record"
    going: dict[str, np.ndarray] = {}
    owners = {slot.owner for slot in graph.flow.slots} | {slot.tensor for slot in graph.flow.slots}
    for number, entry in enumerate(record.message.prune_record):
        place = f"{source}: prune_record[{number}]"
        for node in (*entry.producer, *entry.consumer):
            if node.name not in owners:
                hint = did_you_mean(node.name, owners)
                raise RecordError(
                    f"{place}: {node.name}: the model has no such layer with channels that can "
                    f"be followed{hint}"
                )
        together = [graph.group_of(node.name) for node in entry.producer]
        for node, group in zip(entry.producer, together, strict=True):
            if group is None:
                raise RecordError(
                    f"{place}.producer[{node.name}]: the model's layer makes no channels: "
                    f"{graph.why_whole(node.name)}"
                )
            _check(node, [m for m in group.producers if m.slot.owner == node.name], place)
        _check_together(entry.producer, together, place)
        groups = {group.index for group in together if group is not None}
        for node in entry.consumer:
            members = [
                member
                for group in graph.groups
                for member in group.consumers
                if node.name in (member.slot.owner, member.slot.tensor) and (group.index in groups)
            ]
            if not members:
                raise RecordError(
                    f"{place}.consumer[{node.name}]: the model's layer takes none of the channels "
                    f"of {', '.join(producer.name for producer in entry.producer)}"
                )
            _check(node, members, place)
        for node in entry.producer:
            mask = _going(node, graph, place)
            if mask is not None:
                going[node.name] = mask
    try:
        return gone_of_layers(graph, going)
    except UnfitRemovalError as error:
        raise RecordError(f"{source}: it does not fit the model: {error}") from None


def _check_together(nodes: Sequence[PruneNode], groups: Sequence[Group | None], place: str) -> None:
    """Finds producers of the same channels that are apart in the model."""
    for i, (node, group) in enumerate(zip(nodes, groups, strict=True)):
        for other, others in zip(nodes[:i], groups[:i], strict=True):
            begins = [attribute(one, "begin") for one in (node, other)]
            ends = [attribute(one, "end") for one in (node, other)]
            if max(begins) < min(ends) and group is not others:
                raise RecordError(
                    f"{place}: {other.name} and {node.name} make the same channels here; in the "
                    "model they do not hang together"
                )


def _check(node: PruneNode, members: Sequence[Member], place: str) -> None:
    """Holds a node's type, axis and number of channels against the model's layer."""
    kind = attribute(node, "type")
    kinds = {_plain(member.slot.kind) for member in members}
    if kind is not None and _plain(kind) not in kinds:
        raise RecordError(
            f"{place}: {node.name} is of type {shown(kind)} here; in the model of type "
            f"{', '.join(sorted({member.slot.kind for member in members}))}"
        )
    begin, end = attribute(node, "begin"), attribute(node, "end")
    if begin is None or end is None:
        raise RecordError(f"{place}: {node.name} has no begin and end")
    own = max(m.end for m in members) - min(m.begin for m in members)
    sizes = {own, *(len(member.positions) for member in members)}
    if end - begin not in sizes:
        raise RecordError(
            f"{place}: {node.name} has channels {begin} to {end} here, which is {end - begin}; in "
            f"the model {own}"
        )
    axis = attribute(node, "prune_axis")
    axes = {member.slot.axis for member in members}
    if axis is not None and axis not in axes:
        raise RecordError(
            f"{place}: {node.name} has prune_axis {axis} here; in the model {min(axes)}"
        )


def _plain(kind: str) -> str:
    return OTHER_TYPES.get(kind, kind)


def _going(node: PruneNode, graph: ChannelGraph, place: str) -> np.ndarray | None:
    """Whether each channel of a producer goes; None where the record does not say."""
    index = attribute(node, "prune_index")
    if index is None:
        return None
    group = graph.group_of(node.name)
    assert group is not None
    number = next(len(m.positions) for m in group.producers if m.slot.owner == node.name)
    begin = attribute(node, "begin") or 0
    own = np.array(index, dtype=np.int64)
    if own.size and own.max() >= number and own.min() >= begin:
        own = own - begin  # counted along the coupled axis
    if own.size and (own.max() >= number or own.min() < 0):
        raise RecordError(
            f"{place}: {node.name} has prune_index {int(own.max())}; the layer has {number} "
            "channels"
        )
    mask = np.zeros(number, dtype=bool)
    mask[own] = True
    return mask
