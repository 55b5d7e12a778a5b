"""Where channels lie in the weights of a model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

# Kind of a weight that is read as a tensor of its own.
BARE = "Parameter"


class Role(Enum):
    """What a layer does with the channels along an axis of its weight."""

    MAKES = "producer"
    TAKES = "consumer"
    FOLLOWS = "follower"


@dataclass(frozen=True)
class Slot:
    """One axis of one weight that counts channels.

    Attributes:
        owner: dotted path of the module that holds the weight, or whose call has no weight.
        tensor: dotted name of the parameter or buffer; empty for a module without any, whose
            attributes count channels all the same.
        axis: of the tensor.
        labels: label of each entry along the axis; with `groups`, of the entries of all groups
            one after the other.
        role: what the layer does with these channels.
        kind: ONNX type of the operation.
        call: index of the call in the trace.
        groups: of a convolution, for an axis that counts the channels of one group.
    """

    owner: str
    tensor: str
    axis: int
    labels: np.ndarray
    role: Role
    kind: str
    call: int
    groups: int = 1


@dataclass(frozen=True)
class Blocks:
    """Channels in equal blocks that have to keep equal numbers.

    Attributes:
        labels: of the channels, one block after the other.
        number: of blocks.
        where: what asks for it, for messages.
    """

    labels: np.ndarray
    number: int
    where: str
