"""Microscaling formats for Linear: blocks whose scales follow from their own content."""

from __future__ import annotations

from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.minmax import NoOptions
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor


class MxQuantLinear(LinearQuantizeModule):
    """Linear in mx formats (OCP MX v1.0): nothing is collected, inputs are scaled as they come."""

    Options = NoOptions

    def solve(self) -> LinearSolution:
        """Each block of the weight by the scale with the smaller error."""
        weights, inputs = self.request.weights, self.request.inputs
        return LinearSolution(
            QuantizedTensor.nearest(self.weight, weights.format, weights.granularity),
            None if inputs is None else InputQuantizer(inputs.format, inputs.granularity),
        )
