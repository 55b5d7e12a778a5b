"""AWQ for Linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from amct_pytorch.algorithms.awq import AwqSettings, choose_input_scale, quantize_scaled
from amct_pytorch.algorithms.hessian import Hessian
from amct_pytorch.algorithms.padding import unpadded
from amct_pytorch.algorithms.sharing import InputStatistics
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.config.models import Strict
from amct_pytorch.errors import CalibrationError
from amct_pytorch.low_bit.balanced import Balance, BalancedLinear, TiedChannels
from amct_pytorch.low_bit.solution import LinearSolution, QuantizedTensor


class AwqOptions(Strict):
    """Options of ``awq``."""

    grids_num: Annotated[int, Field(ge=1, description="an integer from 1, default 20")] = 20


class AwqStatistics(InputStatistics):
    """Of one input: second moments and sums of magnitudes over all tokens.

    Attributes:
        moments: E[x xᵀ].
        sum_abs: Σ|x|, float32 [K].
    """

    def __init__(self, owner: object, features: int, device: torch.device) -> None:
        super().__init__(owner)
        self.moments = Hessian(features, device)
        self.sum_abs = torch.zeros(features, device=device)
        self._mean: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Counts tokens [tokens, K]."""
        self._mean = None
        self.moments.add(rows)
        self.sum_abs += rows.float().abs().sum(0)

    def mean(self) -> Tensor:
        """E[x xᵀ], float32 [K, K], computed once."""
        if self._mean is None:
            self._mean = self.moments.mean()
        return self._mean


class AwqLinear(BalancedLinear[AwqStatistics]):
    """Linear by AWQ: second moments and mean magnitudes of all tokens, then the search."""

    Options = AwqOptions

    @property
    def grid(self) -> WeightGrid:
        """The numbers that the weight may take."""
        weights = self.request.weights
        return WeightGrid(weights.format, weights.granularity, weights.symmetric)

    def new_statistics(self, x: Tensor) -> AwqStatistics:
        """Nothing counted."""
        return AwqStatistics(self, self.in_features, x.device)

    def count(self, statistics: AwqStatistics, x: Tensor) -> None:
        """Counts one batch."""
        statistics.add(unpadded(x))

    @classmethod
    def choose(cls, layers: Sequence[AwqLinear], tied: TiedChannels) -> Balance:
        """The exponent of least output error of all layers together."""
        found = layers[0].counted()
        tokens = found.moments.tokens
        if not tokens:
            raise CalibrationError(
                f"{layers[0].layer_name}: no input token was seen in calibration (0 tokens); run "
                "batches that reach it"
            )
        options = AwqOptions.model_validate(layers[0].request.options)
        chosen = choose_input_scale(
            [layer.float_weight for layer in layers],
            found.mean(),
            tied.mean(found.sum_abs / tokens),
            [layer.grid for layer in layers],
            AwqSettings(options.grids_num),
        )
        return Balance(chosen.scale if chosen.alpha else None, (f"exponent {chosen.alpha:.2f}",))

    def solve_with(self, factors: Tensor) -> LinearSolution:
        """Narrowed ranges, and weights to the nearest."""
        weights, weight = self.request.weights, self.float_weight
        moments = self.counted().mean()
        ones = torch.ones_like(factors)
        nearest = quantize_scaled(weight, moments, ones, self.grid, AwqSettings(clip=False)).loss
        layer = quantize_scaled(weight, moments, factors, self.grid)
        quantized = QuantizedTensor.nearest(
            weight * factors,
            weights.format,
            weights.granularity,
            scale=layer.params.scale,
            offset=layer.params.offset,
        )
        share = layer.loss / nearest if nearest else 1.0
        return LinearSolution(quantized, notes=(f"output error {share:.2f} of nearest rounding's",))
