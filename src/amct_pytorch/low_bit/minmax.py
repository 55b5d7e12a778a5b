"""MIN-MAX: the extremes of weights and inputs are the ends of their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.config.low_bit import InputsConfig
from amct_pytorch.config.models import Strict
from amct_pytorch.formats import scale_from_range
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor


class NoOptions(Strict):
    """Of an algorithm without options."""


class RunningRange:
    """Smallest and largest value over batches, 0 always between them.

    Attributes:
        lo: float32 [1], at most 0.
        hi: float32 [1], at least 0.
    """

    def __init__(self) -> None:
        self.lo, self.hi = torch.zeros(1), torch.zeros(1)

    def add(self, x: Tensor) -> None:
        """Takes in one batch of any shape; an empty one changes nothing."""
        if x.numel():
            lo, hi = (end.float() for end in torch.aminmax(x))
            self.lo, self.hi = self.lo.to(x.device), self.hi.to(x.device)
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)


def input_quantizer(config: InputsConfig, seen: RunningRange) -> InputQuantizer:
    """The quantizer of inputs by their extremes; token and group scales are dynamic."""
    if config.strategy != "tensor":
        return InputQuantizer(config.format, config.granularity)
    params = scale_from_range(seen.lo, seen.hi, config.format, symmetric=config.symmetric)
    return InputQuantizer(config.format, config.granularity, params.scale, params.offset)


class MinMaxLinear(LinearQuantizeModule):
    """Linear by MIN-MAX: weights to the nearest; inputs by their range over all batches."""

    Options = NoOptions

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self._seen = RunningRange()

    def observe(self, x: Tensor) -> None:
        """Widens the range of inputs."""
        if self.request.inputs is not None and self.request.inputs.strategy == "tensor":
            self._seen.add(x)

    def solve(self) -> LinearSolution:
        """Weights rounded to the nearest, and the quantizer of inputs."""
        weights, inputs = self.request.weights, self.request.inputs
        return LinearSolution(
            QuantizedTensor.nearest(
                self.weight, weights.format, weights.granularity, symmetric=weights.symmetric
            ),
            None if inputs is None else input_quantizer(inputs, self._seen),
        )
