"""SmoothQuant for Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from amct_pytorch.algorithms.padding import unpadded
from amct_pytorch.algorithms.smoothquant import (
    choose_strength,
    least_relative_error,
    smooth_factors,
)
from amct_pytorch.config.models import Strict
from amct_pytorch.errors import CalibrationError
from amct_pytorch.formats import IntFormat, scale_from_range
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor
from amct_pytorch.observers.channel_range import ChannelRange
from amct_pytorch.observers.input_sample import InputSample

# Shares of the input scale by extremes that are tried for floating formats: those with room
# beyond their most precise zone can have the few largest inputs there.
SHARES = (1.0, 2.0**-2, 2.0**-4, 2.0**-6)


class SmoothQuantOptions(Strict):
    """Options of ``smoothquant``."""

    smooth_strength: Annotated[
        float, Field(ge=0, le=1, description="a number from 0 to 1, default 0.5")
    ] = 0.5


class SmoothQuantLinear(LinearQuantizeModule):
    """Linear by SmoothQuant: ranges of input channels over all batches, then the factors.

    With a static scale of the inputs a higher strength than the one asked for, and for floating
    formats a smaller scale, is taken where the layer's output error on a sample of its tokens is
    less; the ledger says so.
    """

    Options = SmoothQuantOptions

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self._range = ChannelRange(self.in_features, self.weight.device)
        self._tokens = InputSample(self.batch_num)

    def observe(self, x: Tensor) -> None:
        """Widens the ranges and keeps some tokens; those under a `padding_mask` do not count."""
        tokens = unpadded(x)
        self._range.add(tokens)
        self._tokens.add(tokens)

    def solve(self) -> LinearSolution:
        """Factors, then weights and inputs to the nearest by their smoothed ranges."""
        strength = SmoothQuantOptions.model_validate(self.request.options).smooth_strength
        weight = self.weight.float()
        input_max, weight_max = self._range.magnitude, weight.abs().amax(0)
        if not bool(input_max.any()):
            raise CalibrationError(
                f"the input of layer {self.layer_name!r} was empty or 0 in every calibration batch"
            )
        notes: tuple[str, ...] = ()
        inputs = self.request.inputs
        assert inputs is not None  # the table of combinations has no other rows
        if inputs.strategy != "tensor":
            factors = smooth_factors(input_max, weight_max, strength)
            return self._solution(factors, notes)
        tokens = self._tokens.tokens(self.in_features).to(weight.device)

        def output(factors: Tensor, share: float = 1.0) -> Tensor:
            solution = self._solution(factors, (), share)
            assert solution.inputs is not None
            return solution.inputs.simulate(tokens / factors) @ solution.weight.dequantize().T

        chosen = choose_strength(input_max, weight_max, strength, tokens, weight, output)
        error, share = chosen.error, 1.0
        if not isinstance(inputs.format, IntFormat):
            outputs = (output(chosen.factors, share) for share in SHARES)
            best, error, _ = least_relative_error(outputs, tokens @ weight.T)
            share = SHARES[best]
        changes = []
        if chosen.strength != strength:
            changes.append(f"smooth_strength {chosen.strength:.2g} for {strength:.2g}")
        if share != 1:
            changes.append(f"input scale {share:.2g} of that by extremes")
        if changes:
            told = f"relative output error {error:.2g} for {chosen.error_asked:.2g}"
            notes = (f"{', '.join(changes)}: {told}",)
        return self._solution(chosen.factors, notes, share)

    def _solution(
        self, factors: Tensor, notes: tuple[str, ...], share: float = 1.0
    ) -> LinearSolution:
        """Everything to the nearest; a static input scale is `share` of that by extremes."""
        weights, inputs = self.request.weights, self.request.inputs
        assert inputs is not None
        quantizer = InputQuantizer(inputs.format, inputs.granularity)
        if inputs.strategy == "tensor":
            low = torch.amin(self._range.lo / factors).reshape(1)
            high = torch.amax(self._range.hi / factors).reshape(1)
            params = scale_from_range(low, high, inputs.format, symmetric=inputs.symmetric)
            quantizer = InputQuantizer(
                inputs.format, inputs.granularity, params.scale * share, params.offset
            )
        weight = QuantizedTensor.nearest(
            self.weight.float() * factors,
            weights.format,
            weights.granularity,
            symmetric=weights.symmetric,
        )
        return LinearSolution(weight, quantizer, factors, notes=notes)
