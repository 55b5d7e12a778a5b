"""GPTQ for linear layers: weights only, solved under the second moments of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from amct_pytorch.algorithms.gptq import GptqResult, GptqSettings
from amct_pytorch.algorithms.gptq_calibration import GptqCalibration
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.config.models import Strict, YesNo
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.solution import LinearSolution, QuantizedTensor


class GptqOptions(Strict):
    """Options of ``gptq``, with the meaning and defaults of `GptqSettings`."""

    damping: Annotated[
        float,
        Field(ge=0, le=1, description=f"a number in [0, 1], default {GptqSettings.damping}"),
    ] = GptqSettings.damping
    act_order: YesNo = GptqSettings.act_order
    static_groups: YesNo = GptqSettings.static_groups
    sweeps: Annotated[
        int,
        Field(ge=0, le=100, description=f"an integer in [0, 100], default {GptqSettings.sweeps}"),
    ] = GptqSettings.sweeps


class GptqLinear(LinearQuantizeModule):
    """Linear by GPTQ.

    Attributes:
        sequential: layers behind quantized ones are best calibrated on what those leave.
        reference: the input of the next call in the float model, where `calibrate_blocks`
            follows that; its difference to the input is made up for.
        result: losses, damping and what else was found; None before solving.
    """

    Options = GptqOptions
    sequential = True

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self.reference: Tensor | None = None
        self.result: GptqResult | None = None
        settings = GptqSettings(**self.request.options)
        self._calibration = GptqCalibration(layer_name, settings)

    def observe(self, x: Tensor) -> None:
        """Adds a batch to the second moments; layers called with the same tensor share them."""
        self._calibration.observe(x, self.reference)

    def solve(self) -> LinearSolution:
        """Codes and scales, and for the ledger the error next to that of plain rounding."""
        weights = self.request.weights
        grid = WeightGrid(weights.format, weights.granularity, weights.symmetric)
        self.result = found = self._calibration.solve(self.weight, grid)
        quantized = QuantizedTensor(
            found.codes, found.scale, found.offset, weights.format, weights.granularity
        )
        notes = [
            f"squared output error {found.loss:.3g}, {found.loss_nearest:.3g} by rounding to the "
            f"nearest; damping {found.damping:.2g} on the diagonal"
        ]
        if found.dead_columns:
            notes.append(
                f"{found.dead_columns} input channels had no input, their weights are rounded to "
                "the nearest"
            )
        if found.fell_back is not None:
            notes.append(f"rounded to the nearest: {found.fell_back}")
        return LinearSolution(quantized, notes=tuple(notes))
