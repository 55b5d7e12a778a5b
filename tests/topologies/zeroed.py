"""The reference of channel pruning: the whole network with the channels that went zeroed."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from amct_pytorch.graph.coupling.slots import Slot


def zeroed(model: nn.Module, slots: list[Slot], alive: np.ndarray) -> nn.Module:
    """A copy of full size in which every entry of a weight that was cut out is zero.

    So the channels that went are zero where they are made (weight, bias, BatchNorm's weight and
    bias) and zero where they are taken (columns of the next weights), whatever stands between.
    Statistics *over* channels are the exception: removing a channel is not the same as a zero
    among them. LayerNorm, RMSNorm and GroupNorm take them here over the channels that stay.
    """
    copied = copy.deepcopy(model).eval()
    named: dict[str, Tensor] = dict([*copied.named_parameters(), *copied.named_buffers()])
    for slot in slots:
        left = torch.from_numpy(alive[slot.labels])
        if slot.tensor:
            _zero(named[slot.tensor].data, slot, left)
        module = copied.get_submodule(slot.owner)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and not left.all():
            parent, _, key = slot.owner.rpartition(".")
            setattr(copied.get_submodule(parent), key, _OverKept(module, left))
    return copied


def _zero(tensor: Tensor, slot: Slot, left: Tensor) -> None:
    # A variance of one: zero would be divided by.
    value = 1.0 if slot.tensor.endswith("running_var") else 0.0
    if slot.groups == 1:
        tensor.movedim(slot.axis, 0)[~left] = value
        return
    rows, columns = tensor.shape[0] // slot.groups, tensor.shape[1]
    for group in range(slot.groups):
        own = left[group * columns : (group + 1) * columns]
        tensor[group * rows : (group + 1) * rows][:, ~own] = value


class _OverKept(nn.Module):
    """A normalization with statistics over the channels that stay."""

    def __init__(self, norm: nn.Module, left: Tensor) -> None:
        super().__init__()
        self.norm, self.left = norm, left

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.GroupNorm):
            axis, groups = 1, norm.num_groups
        else:
            axis, groups = x.dim() - 1, 1
        shape = [1] * x.dim()
        shape[axis] = -1
        left = self.left.reshape(shape).expand_as(x).to(x.dtype)
        own = x.movedim(axis, 1).unflatten(1, (groups, -1))
        kept = left.movedim(axis, 1).unflatten(1, (groups, -1))
        over = (2, *range(3, own.dim())) if isinstance(norm, nn.GroupNorm) else (2,)
        count = kept.sum(over, keepdim=True).clamp(min=1)
        mean = (own * kept).sum(over, keepdim=True) / count
        if isinstance(norm, nn.RMSNorm):
            mean = torch.zeros_like(mean)
        spread = ((own - mean) ** 2 * kept).sum(over, keepdim=True) / count
        eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
        y = ((own - mean) * kept / (spread + eps).sqrt()).flatten(1, 2).movedim(1, axis)
        if norm.weight is not None:
            y = y * norm.weight.reshape(shape)
        if getattr(norm, "bias", None) is not None:
            y = y + norm.bias.reshape(shape)
        return y
