"""Cast for Linear: inputs are converted as they are, so that no calibration is needed."""

from __future__ import annotations

import torch

from amct_pytorch.formats import Granularity
from amct_pytorch.low_bit.deploy_linear import LowBitLinear
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.minmax import NoOptions
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor

# Inputs that stand in for data where there are none.
UNIT_INPUTS = 256


class CastLinear(LinearQuantizeModule):
    """Linear with inputs in units of 1; weights' extremes go to where the format is finest.

    `convert` may follow `quantize` directly.
    """

    Options = NoOptions

    @property
    def calibrated(self) -> bool:
        """Always: there is nothing to observe."""
        return True

    @property
    def in_last_batch(self) -> bool:
        """The first batch serves to measure the error."""
        return self.deploy is None

    def solve(self) -> LinearSolution:
        """Weights to the nearest; inputs unscaled."""
        weights, inputs = self.request.weights, self.request.inputs
        weight = QuantizedTensor.nearest(self.weight, weights.format, weights.granularity)
        if inputs is None:
            return LinearSolution(weight)
        one = torch.ones(1, device=self.weight.device)
        # One scale for all: that of every token would be the same.
        return LinearSolution(weight, InputQuantizer(inputs.format, Granularity("tensor"), one))

    def settle(self) -> None:
        """Solves without a batch; the ledger's error is then that of the weights."""
        if self.ori_module is None:
            return
        weight = self.weight
        units = torch.eye(
            min(self.in_features, UNIT_INPUTS),
            self.in_features,
            dtype=weight.dtype,
            device=weight.device,
        )
        with torch.no_grad():
            self._finish(units, units @ weight.T)
        self.outcome.notes.append("no batch was run; its error is of unit inputs")


class CastDeployLinear(LowBitLinear):
    """What becomes of a `CastLinear`, with or without a batch before."""

    def __init__(self, quant_module: CastLinear) -> None:
        quant_module.settle()
        super().__init__(quant_module)
