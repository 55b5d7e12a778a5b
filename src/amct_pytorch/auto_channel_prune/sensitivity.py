"""How much the loss suffers when a channel goes: the base class, and first-order Taylor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amct_pytorch.auto_channel_prune.search_data import SearchData
from amct_pytorch.auto_channel_prune.search_graph import SearchGraph
from amct_pytorch.errors import ModelError
from amct_pytorch.graph.coupling.groups import Group, Member
from amct_pytorch.graph.tensors import random_state_kept, tensors_in, without_autocast
from amct_pytorch.proto import PruneRecord
from amct_pytorch.record.attributes import set_floats

GraphTuple = tuple[SearchGraph, dict[str, dict[str, Any]]]


class SensitivityBase(ABC):
    """Rates the channels that may go; subclasses may be given to the search as instances."""

    @abstractmethod
    def setup_initialization(
        self, graph_tuple: GraphTuple, input_data: Any, test_iteration: int
    ) -> None:
        """Called once, before `get_sensitivity`.

        Args:
            graph_tuple: (graph, graph_info). `graph.model` is a copy of the user's model in
                eval mode, `graph.channels` what hangs together in it. `graph_info[layer]` has
                `cin`, `cout`, `ori_cout` (channels; the first two as they are now) and
                `bitops` (bit complexity).
            input_data: as the user gave it.
            test_iteration: how many samples or pairs of it to use.
        """

    @abstractmethod
    def get_sensitivity(self, search_records: Sequence[PruneRecord]) -> None:
        """Gives every producer of every record an attribute `sensitivity`.

        It is of type FLOATS and has one value for each channel of the producer; the higher, the
        more is lost with the channel.

        Args:
            search_records: one record for each group of coupled channels; changed in place.
        """


class TaylorLossSensitivity(SensitivityBase):
    """Σ |w · ∂loss/∂w| over the weights that hang together with a channel, and the iterations.

    The first-order estimate of what the loss changes by when weights go (Molchanov et al., arXiv
    1906.10771, eq. 8, with absolute values). The loss is the mean absolute difference (L1)
    between the model's output and the label.
    """

    def __init__(self) -> None:
        self._graph: SearchGraph | None = None
        self._products: dict[str, Tensor] = {}

    def setup_initialization(
        self, graph_tuple: GraphTuple, input_data: Any, test_iteration: int
    ) -> None:
        """See `SensitivityBase.setup_initialization`.

        Raises:
            ModelError: no gradient reaches the weights, or the loss is NaN or infinite.
        """
        self._graph = graph_tuple[0]
        model = self._graph.model
        # float32 for half precision: products of small numbers would be lost.
        self._products = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in model.named_parameters()
        }
        was = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(True)
        devices = {tensor.device.type for tensor in model.parameters()}
        try:
            with random_state_kept(model), without_autocast(*devices), torch.enable_grad():
                for inputs, labels in SearchData.of(input_data, test_iteration).pairs():
                    self._add(model, l1_loss(inputs.copied().call(model), labels))
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(was[name])
                parameter.grad = None

    def _add(self, model: nn.Module, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            value = float(loss.detach())
            raise ModelError(f"the loss on input_data is {value}; sensitivities need numbers")
        named = dict(model.named_parameters())
        if not loss.requires_grad:
            raise ModelError("no gradient of the loss reaches the model's weights")
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), found, strict=True):
            if gradient is not None:
                self._products[name] += (parameter.detach().float() * gradient.float()).abs()

    def get_sensitivity(self, search_records: Sequence[PruneRecord]) -> None:
        """See `SensitivityBase.get_sensitivity`."""
        assert self._graph is not None
        for record in search_records:
            group = self._graph.channels.group_of(record.producer[0].name)
            assert group is not None
            whole = _of_channels(group, self._products)
            for node in record.producer:
                member = next(m for m in group.producers if m.slot.owner == node.name)
                inside = member.positions >= 0
                own = np.where(inside, whole[member.positions], 0.0)
                set_floats(node, "sensitivity", own.tolist())


def l1_loss(output: Any, labels: Sequence[Tensor]) -> Tensor:
    """Mean |output - label|, summed over the outputs, if there are several."""
    losses = [
        torch.nn.functional.l1_loss(tensor.float(), label.to(tensor.device).float())
        for tensor, label in zip(tensors_in(output), labels, strict=True)
    ]
    return torch.stack(losses).sum()


def _of_channels(group: Group, products: dict[str, Tensor]) -> np.ndarray:
    """The sum over everything that hangs together with each channel, float64 [channels]."""
    total = np.zeros(len(group))
    for member in group.members:
        if member.slot.tensor in products:
            sums = _along(member, products[member.slot.tensor])
            inside = member.positions >= 0
            total += np.bincount(member.positions[inside], sums[inside], minlength=len(group))
    return total


def _along(member: Member, tensor: Tensor) -> np.ndarray:
    """Sum of the entries at each place along a member's axis."""
    slot = member.slot
    if slot.groups > 1:
        # The axis counts the channels of one group, and the groups follow along axis 0.
        tensor = tensor.unflatten(0, (slot.groups, -1)).transpose(1, 2).flatten(0, 1)
        sums = tensor.flatten(1).sum(1) if tensor.dim() > 1 else tensor
    else:
        moved = tensor.movedim(slot.axis, 0)
        sums = moved.flatten(1).sum(1) if moved.dim() > 1 else moved
    found: np.ndarray = sums.double().cpu().numpy()
    return found
