"""Which layers are called with one tensor: they share what is gathered of it.

Query, key and value; gate and up. The tensor itself tells, while it lives.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from amct_pytorch.logs import logger


class InputStatistics:
    """Statistics of one input tensor, for all layers that are called with it.

    Attributes:
        owner: the layer that counts new batches; the others find them counted.
        batches: how many have been counted.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.batches = 0


Statistics = TypeVar("Statistics", bound=InputStatistics)


@dataclass(frozen=True)
class _Counted:
    """That a tensor has been counted: by which statistics, as which batch, with what content."""

    statistics: weakref.ref[InputStatistics]
    batch: int
    version: int | None


_counted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def statistics_for(
    x: Tensor,
    batch: int,
    owner: object,
    own: Statistics | None,
    make: Callable[[], Statistics],
) -> tuple[Statistics, bool]:
    """The statistics that a layer's input belongs to, and whether they have counted it.

    A layer's first input decides with whom it shares. If it is later given another tensor than
    those it shares with, it goes on alone: from a copy, or, where the owner's batch has been
    counted already, anew from this batch on, with a line in the log.

    Args:
        x: the input.
        batch: how many the layer has seen before. A tensor that comes again in a later batch
            counts again.
        owner: the layer.
        own: the statistics it had so far; None before its first batch.
        make: gives new ones, owned by the layer.

    Returns:
        The layer's statistics from now on. If they have not counted `x`, count it, and then
        call `note_counted`.
    """
    found = _counted.get(x)
    known: Any = None
    if found is not None and (found.batch, found.version) == (batch, _version(x)):
        known = found.statistics()
    if own is None:
        own = make() if known is None else known
    if known is own:
        return own, True
    if own.owner is not owner and own.batches > batch:
        logger.warning(
            "%s shared its input with another layer and is now given one of its own; what it "
            "was given in %d earlier batches does not count",
            getattr(owner, "layer_name", "a layer"),
            batch,
        )
        own = make()
    elif own.owner is not owner:
        own = copy.deepcopy(own, {id(own.owner): owner})
    return own, False


def note_counted(x: Tensor, batch: int, statistics: InputStatistics) -> None:
    """Other layers that are called with `x` in this batch find it counted."""
    statistics.batches = batch + 1
    _counted[x] = _Counted(weakref.ref(statistics), batch, _version(x))


def _version(x: Tensor) -> int | None:
    """Rises with each change in place; tensors of inference mode have none."""
    return None if x.is_inference() else x._version
