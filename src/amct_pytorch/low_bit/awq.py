"""AWQ for Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from amct_pytorch.algorithms.awq import AwqSettings, solve_awq
from amct_pytorch.algorithms.hessian import Hessian
from amct_pytorch.algorithms.padding import unpadded
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.config.models import Strict
from amct_pytorch.errors import CalibrationError
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.solution import LinearSolution, QuantizedTensor


class AwqOptions(Strict):
    """Options of ``awq``."""

    grids_num: Annotated[int, Field(ge=1, description="an integer from 1, default 20")] = 20


class AwqLinear(LinearQuantizeModule):
    """Linear by AWQ: second moments and mean magnitudes of all tokens, then the search.

    Each layer has input factors of its own, also where layers share an input: they are applied
    at the layer's input, so that each can have those that serve it best.
    """

    Options = AwqOptions

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self._moments: Hessian | None = None
        self._sum_abs: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Counts one batch; tokens under a `padding_mask` do not count."""
        rows = unpadded(x)
        if self._moments is None:
            self._moments = Hessian(self.in_features, x.device)
        self._moments.add(rows)
        sums = rows.float().abs().sum(0)
        self._sum_abs = sums if self._sum_abs is None else self._sum_abs + sums

    def solve(self) -> LinearSolution:
        """The layer with the input factors and ranges of least output error."""
        moments, sum_abs = self._moments, self._sum_abs
        self._moments = self._sum_abs = None
        if moments is None or sum_abs is None or not moments.tokens:
            raise CalibrationError(
                f"{self.layer_name}: no input token was seen in calibration; run batches that "
                "reach it"
            )
        weights = self.request.weights
        grid = WeightGrid(weights.format, weights.granularity, weights.symmetric)
        options = AwqOptions.model_validate(self.request.options)
        result = solve_awq(
            [self.weight],
            moments.mean(),
            sum_abs / moments.tokens,
            grid,
            AwqSettings(options.grids_num),
        )
        layer = result.layers[0]
        factors = result.input_scale
        quantized = QuantizedTensor.nearest(
            self.weight.float() * factors,
            weights.format,
            weights.granularity,
            scale=layer.params.scale,
            offset=layer.params.offset,
        )
        share = layer.loss / layer.loss_nearest if layer.loss_nearest else 1.0
        notes = (f"exponent {result.alpha:.2f}, output error {share:.2f} of nearest rounding's",)
        return LinearSolution(quantized, None, factors if result.alpha else None, notes=notes)
