"""Quantile for Linear: the range of inputs is a running mean of the batches' extremes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from amct_pytorch.formats import scale_from_range
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.minmax import NoOptions
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor

MOMENTUM = 0.99


class RunningMagnitude:
    """q = max|x| of the first batch, then 0.99 q + 0.01 max|x| with each further one.

    Attributes:
        q: float32 [1]; None before the first batch.
    """

    def __init__(self) -> None:
        self.q: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Takes in one batch of any shape; an empty one changes nothing."""
        if x.numel():
            largest = x.detach().abs().amax().float().reshape(1)
            self.q = largest if self.q is None else MOMENTUM * self.q + (1 - MOMENTUM) * largest


class QuantileLinear(LinearQuantizeModule):
    """Linear whose scales take weights' extremes, and inputs' running extremes, to 16."""

    Options = NoOptions

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self._magnitude = RunningMagnitude()

    def observe(self, x: Tensor) -> None:
        """Moves the running mean."""
        if self.request.inputs is not None and self.request.inputs.strategy == "tensor":
            self._magnitude.add(x)

    def solve(self) -> LinearSolution:
        """Weights to the nearest, inputs by the running mean."""
        weights, inputs = self.request.weights, self.request.inputs
        weight = QuantizedTensor.nearest(self.weight, weights.format, weights.granularity)
        if inputs is None:
            return LinearSolution(weight)
        if inputs.strategy != "tensor":
            return LinearSolution(weight, InputQuantizer(inputs.format, inputs.granularity))
        q = self._magnitude.q
        if q is None:
            q = self.weight.new_zeros(1).float()
        scale = scale_from_range(-q, q, inputs.format).scale
        return LinearSolution(weight, InputQuantizer(inputs.format, inputs.granularity, scale))
