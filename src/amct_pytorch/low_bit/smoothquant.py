"""SmoothQuant for Linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from amct_pytorch.algorithms.padding import unpadded
from amct_pytorch.algorithms.sharing import InputStatistics
from amct_pytorch.algorithms.smoothquant import (
    SmoothedLayer,
    choose_strength,
    relative_errors,
    smooth_factors,
)
from amct_pytorch.config.models import Strict
from amct_pytorch.errors import CalibrationError
from amct_pytorch.formats import IntFormat, scale_from_range
from amct_pytorch.low_bit.balanced import Balance, BalancedLinear, TiedChannels
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


class SmoothQuantStatistics(InputStatistics):
    """Of one input: the range of each channel over all batches, and some tokens.

    Attributes:
        range: of each channel.
        sample: of tokens.
    """

    def __init__(self, owner: object, features: int, device: torch.device, batches: int) -> None:
        super().__init__(owner)
        self.range = ChannelRange(features, device)
        self.sample = InputSample(batches)

    def tokens(self) -> Tensor:
        """The sample, float32 [tokens, K]."""
        return self.sample.tokens(len(self.range.lo)).to(self.range.lo.device)


class SmoothQuantLinear(BalancedLinear[SmoothQuantStatistics]):
    """Linear by SmoothQuant: ranges of input channels over all batches, then the factors.

    With a static scale of the inputs a higher strength than the one asked for, and for floating
    formats a smaller scale, is taken where the layer's output error on a sample of its tokens is
    less; the ledger says so.
    """

    Options = SmoothQuantOptions

    def new_statistics(self, x: Tensor) -> SmoothQuantStatistics:
        """Nothing counted."""
        return SmoothQuantStatistics(self, self.in_features, x.device, self.batch_num)

    def count(self, statistics: SmoothQuantStatistics, x: Tensor) -> None:
        """Widens the ranges and keeps some tokens."""
        tokens = unpadded(x)
        statistics.range.add(tokens)
        statistics.sample.add(tokens)

    @classmethod
    def choose(cls, layers: Sequence[SmoothQuantLinear], tied: TiedChannels) -> Balance:
        """Factors by the ranges of the input and of all layers' weights."""
        first, found = layers[0], layers[0].counted()
        strength = SmoothQuantOptions.model_validate(first.request.options).smooth_strength
        input_max = found.range.magnitude
        if not bool(input_max.any()):
            raise CalibrationError(
                f"the input of layer {first.layer_name!r} was empty or 0 in every calibration batch"
            )
        maxima = torch.stack([layer.float_weight.abs().amax(0) for layer in layers])
        input_max, weight_max = tied.amax(input_max), tied.amax(maxima.amax(0))
        static = [layer for layer in layers if layer.static]
        if not static:
            return Balance(smooth_factors(input_max, weight_max, strength))
        tokens = found.tokens()
        smoothed = [layer.smoothed(tokens) for layer in static]
        chosen = choose_strength(input_max, weight_max, strength, smoothed)
        notes: tuple[str, ...] = ()
        if chosen.strength != strength:
            told = f"relative output error {chosen.error:.2g} for {chosen.error_asked:.2g}"
            notes = (f"smooth_strength {chosen.strength:.2g} for {strength:.2g}: {told}",)
        return Balance(chosen.factors, notes)

    @property
    def static(self) -> bool:
        """Whether inputs have one scale for all."""
        return self.request.inputs is not None and self.request.inputs.strategy == "tensor"

    def smoothed(self, tokens: Tensor) -> SmoothedLayer:
        """How the layer does on `tokens` with given factors."""
        return SmoothedLayer(
            tokens @ self.float_weight.T,
            lambda factors: self._simulated(self._solution(factors), tokens / factors),
        )

    def solve_with(self, factors: Tensor) -> LinearSolution:
        """Weights and inputs to the nearest by their smoothed ranges."""
        inputs = self.request.inputs
        assert inputs is not None  # the table of combinations has no other rows
        if not self.static or isinstance(inputs.format, IntFormat):
            return self._solution(factors)
        tokens = self.counted().tokens()
        steps = tokens / factors
        outputs = (self._simulated(self._solution(factors, share), steps) for share in SHARES)
        errors = relative_errors(outputs, tokens @ self.float_weight.T) or [0.0]
        best = min(range(len(errors)), key=errors.__getitem__)
        if not best:
            return self._solution(factors)
        told = f"relative output error {errors[best]:.2g} for {errors[0]:.2g}"
        note = f"input scale {SHARES[best]:.2g} of that by extremes: {told}"
        return replace(self._solution(factors, SHARES[best]), notes=(note,))

    def _simulated(self, solution: LinearSolution, steps: Tensor) -> Tensor:
        """The output of a solution, without bias, for inputs that have been divided."""
        assert solution.inputs is not None
        return solution.inputs.simulate(steps) @ solution.weight.dequantize().T

    def _solution(self, factors: Tensor, share: float = 1.0) -> LinearSolution:
        """Everything to the nearest; a static input scale is `share` of that by extremes."""
        weights, inputs = self.request.weights, self.request.inputs
        assert inputs is not None
        quantizer = InputQuantizer(inputs.format, inputs.granularity)
        if self.static:
            seen = self.counted().range
            low = torch.amin(seen.lo / factors).reshape(1)
            high = torch.amax(seen.hi / factors).reshape(1)
            params = scale_from_range(low, high, inputs.format, symmetric=inputs.symmetric)
            quantizer = InputQuantizer(
                inputs.format, inputs.granularity, params.scale * share, params.offset
            )
        weight = QuantizedTensor.nearest(
            self.float_weight * factors,
            weights.format,
            weights.granularity,
            symmetric=weights.symmetric,
        )
        return LinearSolution(weight, quantizer)
