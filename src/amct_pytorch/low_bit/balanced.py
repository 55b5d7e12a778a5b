"""Linear layers whose algorithm divides inputs, and multiplies weights, by factors.

A factor for each input channel. Layers that are called with one tensor share them, and where the
run has shown that it is exact, they are moved into what makes that tensor (`input_sources`), so
that a converted layer has nothing to divide.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.sharing import InputStatistics, note_counted, statistics_for
from amct_pytorch.errors import CalibrationError
from amct_pytorch.graph.trace import Recorder
from amct_pytorch.low_bit.linear import LinearQuantizeModule, some_tokens
from amct_pytorch.low_bit.solution import LinearSolution

# About how many tokens of each layer are kept until its factors are known, to measure its error.
KEPT_TOKENS = 128

Statistics = TypeVar("Statistics", bound=InputStatistics)


@dataclass(frozen=True)
class Balance:
    """What layers that share an input have chosen together.

    Attributes:
        factors: float32 [K], positive; None: ones.
        notes: for the ledger of each.
    """

    factors: Tensor | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TiedChannels:
    """Input channels that must have one factor, because one channel before has made them all.

    Attributes:
        channels: int64 [K], the channel that has made each; None: each has its own.
    """

    channels: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        """`x` [K] with the mean over tied channels in each of them."""
        return self._reduced(x, "mean")

    def amax(self, x: Tensor) -> Tensor:
        """`x` [K], not negative, with the largest of tied channels in each of them."""
        return self._reduced(x, "amax")

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        if self.channels is None:
            return x
        index = self.channels.to(x.device)
        made = x.new_zeros(int(index.max()) + 1)
        return made.scatter_reduce(0, index, x, how, include_self=False)[index]


class BalancedLinear(LinearQuantizeModule, Generic[Statistics]):
    """A Linear under calibration whose inputs will be divided by factors.

    While `watcher` is set, it waits in its last batch until it is told to `settle` with those
    that share its input. Otherwise it solves alone.

    Attributes:
        watcher: writes down what the model does; set from outside around its forward.
        statistics: what has been observed; None before the first batch and after solving.
        output_divisor: what output channels have to be divided by because the layer behind has
            moved its factors here, float32 [N]; None: nothing.
        notes: about the factors' place, for the ledger.
    """

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self.watcher: Recorder | None = None
        self.statistics: Statistics | None = None
        self.output_divisor: Tensor | None = None
        self._kept: Tensor | None = None

    @abstractmethod
    def new_statistics(self, x: Tensor) -> Statistics:
        """Empty statistics of inputs like `x`, owned by this layer."""

    @abstractmethod
    def count(self, statistics: Statistics, x: Tensor) -> None:
        """Takes one batch into the statistics; tokens under a `padding_mask` do not count."""

    @classmethod
    @abstractmethod
    def choose(cls, layers: Sequence[Any], tied: TiedChannels) -> Balance:
        """Factors for layers that share their statistics; equal ones for tied channels."""

    @abstractmethod
    def solve_with(self, factors: Tensor) -> LinearSolution:
        """The quantized layer whose input is divided by `factors`, [K]."""

    @property
    def float_weight(self) -> Tensor:
        """The weight, divided by `output_divisor`, float32 [N, K]."""
        weight = self.weight.float()
        return weight if self.output_divisor is None else weight / self.output_divisor[:, None]

    @property
    def waits(self) -> bool:
        """Whether it has seen all batches and is not solved."""
        return self.calibrated and self.ori_module is not None

    def observe(self, x: Tensor) -> None:
        """Counts one batch, unless a layer called with the same tensor has."""
        own, known = statistics_for(
            x, self.batches_seen, self, self.statistics, lambda: self.new_statistics(x)
        )
        self.statistics = own
        if not known:
            self.count(own, x)
            note_counted(x, self.batches_seen, own)

    def forward(self, x: Tensor) -> Tensor:
        """The float output while calibrating, then the simulated quantized output."""
        if self.waits:  # called again before the model's forward has ended
            alone = type(self).choose([self], TiedChannels())
            self.settle(alone, None, ("factors stay at its input: it is called again and again",))
        if self.watcher is None:
            return super().forward(x)
        return self.watcher.as_one_call(self.layer_name or "", x, super().forward)

    def complete(self, x: Tensor, y: Tensor) -> None:
        """Keeps some tokens for `settle`; without a watcher, solves at once."""
        if self.watcher is None:
            self._finish(x, y)
        else:
            self._kept = some_tokens(x, KEPT_TOKENS).clone()

    def solve(self) -> LinearSolution:
        """The layer by itself, with its factors at its input."""
        balance = type(self).choose([self], TiedChannels())
        return self._solved(balance, ())

    def settle(self, balance: Balance, factors: Tensor | None, notes: tuple[str, ...]) -> None:
        """Solves after what was chosen together with others.

        Args:
            balance: what was chosen.
            factors: those that the layer before has taken over, [K]; None: they stay here.
            notes: for the ledger.
        """
        kept, self._kept = self._kept, None
        assert kept is not None and self.ori_module is not None
        y = self.ori_module(kept)
        if factors is None:
            solution = self._solved(balance, notes)
        else:
            solution = self._solved(replace(balance, factors=factors), notes)
            solution = replace(solution, divisor=None)
            kept = (kept.float() / factors).to(kept.dtype)
        if self.output_divisor is not None:
            y = (y.float() / self.output_divisor).to(y.dtype)
        self.take(solution, kept, y)
        self.scale = balance.factors if factors is None else factors

    def _solved(self, balance: Balance, notes: tuple[str, ...]) -> LinearSolution:
        assert self.ori_module is not None
        factors = balance.factors
        ones = torch.ones(self.in_features, device=self.weight.device)
        solution = self.solve_with(ones if factors is None else factors)
        self.statistics = None
        bias = self.ori_module.bias
        if self.output_divisor is not None and bias is not None:
            bias = bias.detach().float() / self.output_divisor
            solution = replace(solution, bias=bias)
        return replace(solution, divisor=factors, notes=(*balance.notes, *solution.notes, *notes))

    def counted(self) -> Statistics:
        """What has been observed.

        Raises:
            CalibrationError: if nothing has.
        """
        if self.statistics is None:
            raise CalibrationError(
                f"{self.layer_name}: no input token was seen in calibration; run batches that "
                "reach it"
            )
        return self.statistics
