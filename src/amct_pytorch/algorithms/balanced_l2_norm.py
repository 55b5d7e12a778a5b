"""How much each channel of a group counts, by the norms of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from amct_pytorch.graph.coupling.groups import Group, Member

# What is no weight that values are multiplied by.
NO_WEIGHTS = ("bias", "running_mean", "running_var")


def balanced_l2_norm(group: Group, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The importance of each channel of a group: the least goes first.

    For each weight that has a part of the group, the L2 norm of each channel over all other axes
    is put into [0, 1] by the weight's least and greatest norm; those are summed over the weights.
    So no weight outvotes the others by its mere scale.

    Args:
        group: of coupled channels.
        tensors: parameters and buffers of the model by name.

    Returns:
        float64, [channels].
    """
    total = np.zeros(len(group))
    for member in group.members:
        name = member.slot.tensor
        if not name or name.rpartition(".")[2] in NO_WEIGHTS:
            continue
        squares = _squares(member, tensors[name])
        inside = member.positions >= 0
        norms = np.sqrt(
            np.bincount(member.positions[inside], squares[inside], minlength=len(group))
        )
        channels = member.channels
        own = norms[channels]
        spread = own.max() - own.min()
        if spread > 0:
            total[channels] += (own - own.min()) / spread
    return total


def _squares(member: Member, tensor: Tensor) -> np.ndarray:
    """Sum of squares of each entry along the member's axis, in float64."""
    weight = tensor.detach().float()
    slot, axis = member.slot, member.slot.axis
    if slot.groups > 1:
        # Axis 1 counts the channels of one group, and the groups follow along axis 0.
        blocks = weight.unflatten(0, (slot.groups, -1)).transpose(1, 2)
        weight, axis = blocks.flatten(0, 1), 0
    values = weight.cpu().numpy()
    # One pass over the weight, whichever axis stays; reductions of torch are slower along others.
    letters = "abcdefgh"[: values.ndim]
    sums: np.ndarray = np.einsum(f"{letters},{letters}->{letters[axis]}", values, values)
    return sums.astype(np.float64)
