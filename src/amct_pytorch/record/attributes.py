"""Typed attributes of the nodes in a record's pruning part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amct_pytorch.proto import AttrProto, PruneNode

_FIELDS = {
    AttrProto.FLOAT: "f",
    AttrProto.INT: "i",
    AttrProto.STRING: "s",
    AttrProto.FLOATS: "floats",
    AttrProto.INTS: "ints",
    AttrProto.STRINGS: "strings",
}


def attribute(node: PruneNode, name: str) -> Any:
    """The value of a node's attribute, lists as tuples; None if the node has none of the name."""
    for attr in node.attr:
        if attr.name == name and attr.type in _FIELDS:
            value = getattr(attr, _FIELDS[attr.type])
            if isinstance(value, bytes):
                return value.decode("utf-8", "replace")
            return value if isinstance(value, (int, float)) else tuple(value)
    return None


def set_ints(node: PruneNode, name: str, values: Iterable[int]) -> None:
    """Adds an attribute of type INTS."""
    node.attr.add(name=name, type=AttrProto.INTS).ints.extend(values)


def set_int(node: PruneNode, name: str, value: int) -> None:
    """Adds an attribute of type INT."""
    node.attr.add(name=name, type=AttrProto.INT, i=value)


def set_string(node: PruneNode, name: str, value: str) -> None:
    """Adds an attribute of type STRING."""
    node.attr.add(name=name, type=AttrProto.STRING, s=value.encode())


def set_floats(node: PruneNode, name: str, values: Iterable[float]) -> None:
    """Adds an attribute of type FLOATS, in place of one of that name."""
    kept = [attr for attr in node.attr if attr.name != name]
    del node.attr[:]
    node.attr.extend(kept)
    node.attr.add(name=name, type=AttrProto.FLOATS).floats.extend(values)


def pack_mask(mask: Tensor) -> list[int]:
    """A mask's bits as int64: in the order of numpy.packbits, padded to 8 bytes, little-endian."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1))
    padded = np.pad(bits, (0, -bits.size % 8))
    return [int(value) for value in padded.view("<i8")]


def unpack_mask(values: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """The mask of a shape that `pack_mask` made these integers of.

    Raises:
        ValueError: there are more or fewer integers than the shape needs.
    """
    data = np.array(list(values), "<i8")
    number = int(np.prod(shape))
    if data.size != -(-number // 64):
        raise ValueError(f"{data.size} integers for {number} bits; needed: {-(-number // 64)}")
    bits = np.unpackbits(data.view(np.uint8), count=number)
    return torch.from_numpy(bits.astype(bool).reshape(shape))
