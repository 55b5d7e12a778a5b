"""A layer and the activation behind it, with sampled rows of data: what is reconstructed as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat


@dataclass(frozen=True)
class Unit:
    """Rows of a layer's input in the quantized network and of its output in the float one.

    Attributes:
        inputs: x', float32 [groups, rows, K].
        targets: W x + bias of the float network, float32 [rows, channels]; fastest where the
            rows of a channel lie side by side in memory.
        weight: float32 [groups, K, channels of a group].
        bias: float32 [channels].
        activation: f, which is elementwise; takes [rows, channels]. None: the identity.
    """

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    bias: Tensor
    activation: Callable[[Tensor], Tensor] | None = None

    def outputs(self, weight: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """x' times a weight, without bias, [rows, channels], rows of a channel side by side."""
        # So ordered, depthwise layers' products and gradients take half the time.
        return torch.matmul(weight.mT, self.inputs[:, rows].mT).flatten(0, 1).T

    def activated(self, y: Tensor) -> Tensor:
        """f(y)."""
        return y if self.activation is None else self.activation(y)

    @cached_property
    def wanted(self) -> Tensor:
        """f of the targets."""
        return self.activated(self.targets)

    @cached_property
    def power(self) -> float:
        """Variance of what is wanted, summed over channels; 1 where that is 0."""
        return float(self.wanted.var(0, correction=0).sum()) or 1.0

    def loss(self, errors: Tensor) -> float:
        """Errors of channels [channels], in units of the power of what is wanted.

        A channel that hardly varies counts as little as it does to the layer behind.
        """
        return float(errors.sum()) / self.power

    @cached_property
    def slopes(self) -> Tensor | None:
        """Squared slope of f at the targets, [rows, channels]; None without an activation."""
        if self.activation is None:
            return None
        step = 1e-3 * self.targets.std(0, correction=0).clamp(min=1e-12)
        rise = self.activated(self.targets + step) - self.activated(self.targets - step)
        return (rise / (2 * step)).square_()

    @property
    def ridge_share(self) -> float:
        """How much of its errors on independent inputs a weight is charged with, in (0, 1).

        The rows are a sample, and what they do not show costs too: the share is that of weights
        of a channel to rows, small where there are many more rows.
        """
        _, rows, size = self.inputs.shape
        return size / (size + rows)

    @cached_property
    def ridge_power(self) -> Tensor:
        """What an error of each weight is charged with beside its rows, [groups, K, 1]."""
        return self.inputs.square().mean(1)[:, :, None] * self.ridge_share

    def ridge(self, weight: Tensor) -> Tensor:
        """The charge for a weight's difference to the layer's own, [channels]."""
        return ((weight - self.weight).square() * self.ridge_power).sum(1).flatten()

    def errors(self, y: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Mean squared error of f(y) in each channel, [channels]."""
        return (self.activated(y) - self.wanted[rows]).square_().mean(0)

    def per_channel(self, values: Tensor) -> Tensor:
        """[channels] (or [1]) shaped to broadcast over the weight."""
        if values.numel() == 1:
            return values.reshape(1, 1, 1)
        return values.reshape(self.weight.shape[0], 1, -1)

    def nearest(self, scale: Tensor, fmt: IntFormat) -> Tensor:
        """The weight in units of a scale [channels] or [1], rounded to the nearest."""
        return fmt.round(self.weight / self.per_channel(scale))

    def of_rows(self, rows: slice | Tensor) -> Unit:
        """The same layer with some of the rows, or with all in another order."""
        if isinstance(rows, slice):
            return replace(self, inputs=self.inputs[:, rows], targets=self.targets[rows])
        inputs, targets = self.inputs.index_select(1, rows), self.targets.T.index_select(1, rows).T
        return replace(self, inputs=inputs, targets=targets)

    def some_rows(self, number: int) -> slice:
        """At least so many rows at even distances, or all."""
        return slice(None, None, max(1, self.inputs.shape[1] // number))


def best_bias(unit: Unit, weight: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """The best of a few biases for each channel, and its errors, both [channels].

    Those are the layer's own; the one that takes out the mean difference, over all rows and
    over those where f lets a difference through; and others.
    """
    y = unit.outputs(weight)
    residual = unit.targets - y
    tried = [unit.bias, residual.mean(0), *others]
    if unit.slopes is not None:
        total = unit.slopes.sum(0)
        through = (residual * unit.slopes).sum(0) / total.clamp(min=1e-12)
        tried.append(torch.where(total > 0, through, unit.bias))
    best, least = tried[0], unit.errors(y + tried[0])
    for bias in tried[1:]:
        errors = unit.errors(y + bias)
        best = torch.where(errors < least, bias, best)
        least = torch.minimum(errors, least)
    return best, least
