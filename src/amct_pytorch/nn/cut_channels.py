"""A copy of a model with some of its channels taken out of every weight they lie in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from amct_pytorch.graph.coupling.slots import Role, Slot
from amct_pytorch.graph.look import copy_with


def cut_channels(model: nn.Module, slots: Sequence[Slot], alive: np.ndarray) -> nn.Module:
    """A copy of a model without the channels that go.

    Its modules are those of the model's classes with smaller weights and with attributes
    (`out_channels`, `groups`, `num_features`, …) that say so. Mode, hooks, device, dtype, memory
    format and `requires_grad` are the model's.

    Args:
        model: left as it is.
        slots: where channels lie in it.
        alive: whether each label stays.

    Raises:
        ModelError: the model cannot be copied.
    """
    by_tensor: dict[str, list[Slot]] = defaultdict(list)
    changed = [slot for slot in slots if not alive[slot.labels].all()]
    for slot in changed:
        by_tensor[slot.tensor].append(slot)
    named: dict[str, Tensor] = dict([*model.named_parameters(), *model.named_buffers()])
    others: dict[Tensor, Tensor] = {}
    for name, axes in by_tensor.items():
        if name:
            others[named[name]] = _like(named[name], cut_tensor(named[name], axes, alive))
    copied = copy_with(model, others)
    modules = dict(copied.named_modules())
    for slot in changed:
        if slot.owner in modules:
            _set_attributes(modules[slot.owner], slot, int(alive[slot.labels].sum()))
    return copied


def cut_tensor(tensor: Tensor, slots: Sequence[Slot], alive: np.ndarray) -> Tensor:
    """The entries of a tensor that stay.

    Args:
        tensor: a weight, bias, or statistic.
        slots: its axes that count channels.
        alive: whether each label stays.
    """
    left = tensor.detach()
    # Axes that count the channels of one group need all of their rows to tell the groups by.
    for slot in sorted(slots, key=lambda slot: -slot.groups):
        rows = torch.from_numpy(np.flatnonzero(alive[slot.labels])).to(left.device)
        if slot.groups == 1:
            left = left.index_select(slot.axis, rows)
            continue
        size = left.shape[1]
        blocks = left.unflatten(0, (slot.groups, -1))
        table = (rows % size).reshape(slot.groups, -1)
        parts = [block[:, own] for block, own in zip(blocks, table, strict=True)]
        left = torch.cat(parts)
    return left


def _like(was: Tensor, now: Tensor) -> Tensor:
    """A tensor of its own, a parameter if the other is one, in the same memory format."""
    if was.dim() == 4 and was.is_contiguous(memory_format=torch.channels_last):
        now = now.contiguous(memory_format=torch.channels_last)
    else:
        now = now.contiguous()
    if isinstance(was, nn.Parameter):
        return nn.Parameter(now, requires_grad=was.requires_grad)
    return now.clone()


def _set_attributes(module: nn.Module, slot: Slot, number: int) -> None:
    """Makes a module say how many channels it has along one axis.

    Args:
        module: the one that owns the slot.
        slot: of it.
        number: of channels left along the slot.
    """
    name = slot.tensor.rpartition(".")[2]
    if isinstance(module, _ConvNd) and name == "weight":
        _set_conv(module, slot, number)
    elif isinstance(module, nn.Linear) and name == "weight":
        if slot.axis == 0:
            module.out_features = number
        else:
            module.in_features = number
    elif isinstance(module, _NormBase):
        module.num_features = number
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = number
        module.num_channels = number
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        shape = list(module.normalized_shape)
        shape[slot.axis] = number
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = number
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = number


def _set_conv(module: _ConvNd, slot: Slot, number: int) -> None:
    if slot.role is Role.FOLLOWS:  # depthwise
        transposed = isinstance(module, _ConvTransposeNd)
        several = module.out_channels // module.in_channels
        module.in_channels = number if transposed else number // several
        module.out_channels = module.in_channels * several
        module.groups = module.in_channels
    elif slot.role is Role.MAKES:
        module.out_channels = number
    else:
        module.in_channels = number
