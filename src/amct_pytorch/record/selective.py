"""2:4 sparsity in the record file: which layers are sparse, and which weights stay at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from amct_pytorch.errors import ProblemList, RecordError, did_you_mean, shown
from amct_pytorch.graph.layers import SeenLayer
from amct_pytorch.record.attributes import attribute, pack_mask, set_ints, unpack_mask
from amct_pytorch.record.record_file import RecordFile


@dataclass(frozen=True)
class SelectiveNode:
    """One sparse layer of a record.

    Attributes:
        shape: of its weight.
        mask: bool, of that shape: what stays; None where the record does not say.
    """

    shape: tuple[int, ...]
    mask: Tensor | None


def add_masks(record: RecordFile, masks: Mapping[str, Tensor]) -> None:
    """Adds one `selective_prune` entry for each layer; `masks` in the model's module order."""
    for name, mask in masks.items():
        node = record.message.prune_record.add().selective_prune
        node.name = name
        set_ints(node, "mask_shape", mask.shape)
        set_ints(node, "selective_mask", pack_mask(mask))


def has_selective(record: RecordFile) -> bool:
    """Whether the record is one of 2:4 sparsity."""
    return any(entry.HasField("selective_prune") for entry in record.message.prune_record)


def selective_nodes(record: RecordFile, layers: Sequence[SeenLayer]) -> dict[str, SelectiveNode]:
    """The sparse layers of a record, held against a model's layers.

    Raises:
        RecordError: all of them in one error (up to ten), in the record's order: a layer that
            the model does not have, that is there twice or whose one call is out of reach, a
            shape that is not that of its weight, a mask of another size.
    """
    problems = ProblemList(record.source or "record", RecordError)
    known = {layer.name: layer for layer in layers}
    found: dict[str, SelectiveNode] = {}
    for entry in record.message.prune_record:
        if not entry.HasField("selective_prune"):
            continue
        node = entry.selective_prune
        place = f"selective_prune[{node.name}]"
        layer = known.get(node.name)
        if layer is None:
            hint = did_you_mean(node.name, known)
            problems.add(f"{place}: the model has no such layer{hint}")
            continue
        if node.name in found:
            problems.add(f"{place} is there more than once")
        if layer.unreachable is not None:
            problems.add(f"{place}: {node.name} cannot be pruned: {layer.unreachable}")
        shape = attribute(node, "mask_shape")
        if shape != layer.weight_shape:
            problems.add(
                f"{place}.mask_shape is {shown(shape)}; the model's weight has "
                f"{shown(layer.weight_shape)}"
            )
            continue
        packed, mask = attribute(node, "selective_mask"), None
        if packed is not None:
            try:
                mask = unpack_mask(packed, shape)
            except ValueError as error:
                problems.add(f"{place}.selective_mask has {error}")
        found[node.name] = SelectiveNode(shape, mask)
    problems.raise_if_any()
    return found
