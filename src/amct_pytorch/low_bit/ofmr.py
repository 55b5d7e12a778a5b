"""OFMR for Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from amct_pytorch.algorithms.clip_search import clip_search
from amct_pytorch.algorithms.ofmr import choose_scale
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.errors import CalibrationError
from amct_pytorch.formats import Granularity, QuantParams, fake_quantize, params_of
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.minmax import NoOptions, RunningRange, input_quantizer
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor
from amct_pytorch.observers.token_sample import TokenSample


class OfmrLinear(LinearQuantizeModule):
    """Linear by OFMR: output errors are measured on a sample of tokens of all batches.

    A static scale of the inputs first, with the weight to the nearest; then the weight's scales,
    each output channel's by its own error where they are per channel.
    """

    Options = NoOptions

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self._range = RunningRange()
        self._tokens = TokenSample(self.batch_num)

    def observe(self, x: Tensor) -> None:
        """Widens the range and keeps some tokens."""
        self._range.add(x)
        self._tokens.add(x)

    def solve(self) -> LinearSolution:
        """Inputs and weights by the scales with the least output error."""
        tokens = self._tokens.rows(self.in_features).to(self.weight.device)
        if not len(tokens):
            raise CalibrationError(
                f"the input of layer {self.layer_name!r} was empty in every calibration batch"
            )
        weights = self.request.weights
        weight = self.weight.float()
        grid = WeightGrid(weights.format, weights.granularity, weights.symmetric)
        by_extremes = params_of(weight, grid.fmt, grid.granularity)
        nearest = _rounded(weight, by_extremes, grid)
        quantizer = self._quantizer(tokens, weight, nearest)
        seen = tokens if quantizer is None else quantizer.simulate(tokens)
        searched = clip_search(weight, by_extremes, seen.T @ seen / len(seen), grid)
        # The search does not see how the two errors add up, so the outputs have the last word.
        meant = tokens @ weight.T
        errors = [
            float((seen @ values.T - meant).square().sum())
            for values in (nearest, _rounded(weight, searched, grid))
        ]
        params = searched if errors[1] < errors[0] else by_extremes
        return LinearSolution(
            QuantizedTensor.nearest(weight, grid.fmt, grid.granularity, scale=params.scale),
            quantizer,
        )

    def _quantizer(self, tokens: Tensor, weight: Tensor, nearest: Tensor) -> InputQuantizer | None:
        inputs = self.request.inputs
        if inputs is None:
            return None
        by_range = input_quantizer(inputs, self._range)
        if by_range.scale is None:
            return by_range

        def quantized_output(scale: Tensor) -> Tensor:
            rounded = fake_quantize(tokens, scale, None, inputs.format, Granularity("tensor"))
            return rounded @ nearest.T

        scale, _ = choose_scale(by_range.scale, tokens @ weight.T, quantized_output)
        return InputQuantizer(inputs.format, inputs.granularity, scale)


def _rounded(weight: Tensor, params: QuantParams, grid: WeightGrid) -> Tensor:
    return fake_quantize(weight, params.scale, None, grid.fmt, grid.granularity)
