"""The two stages of calibration: observing the float network, then solving it layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amct_pytorch.algorithms.bias_correction import BiasCorrection
from amct_pytorch.errors import CalibrationError
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.simulate import IntegerOperands, integer_bias, without_autograd
from amct_pytorch.nn.wrapped import CompressedLayer, Stage
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.statistics import Agreement, LayerStatistics, channel_means, sample


@dataclass(frozen=True)
class LayerErrors:
    """Agreement of one layer's output with the float network's, everything before quantized.

    Attributes:
        uncorrected: with the original bias.
        final: with the bias that is deployed.
        corrected: whether that is a corrected one.
    """

    uncorrected: Agreement
    final: Agreement
    corrected: bool


class Observe(Stage):
    """Runs the float network and collects `LayerStatistics`.

    Args:
        names: the layers.
        with_outputs: those whose output range is wanted too.

    Attributes:
        statistics: by layer.
        kept: whether the present batch will be run again to solve.
        last_kept: number of the last such batch.
    """

    def __init__(self, names: list[str], with_outputs: frozenset[str]) -> None:
        self.statistics = {name: LayerStatistics() for name in names}
        for name in with_outputs:
            self.statistics[name].outputs = Histogram()
        self.kept = False
        self.last_kept = 0
        self._batch = 0

    def begin(self, batch: int, *, kept: bool) -> None:
        """Says which batch comes next."""
        self._batch, self.kept = batch, kept
        if kept:
            self.last_kept = batch

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The float result."""
        statistics = self.statistics[layer.name]
        try:
            statistics.inputs.update(call.x)
        except ValueError:
            raise CalibrationError(
                f"the input of layer {layer.name!r} holds NaN or infinity in calibration batch "
                f"{self._batch + 1}; check the calibration data and the layers before this one"
            ) from None
        y = call.run(call.x, layer.weight, layer.bias)
        if statistics.outputs is not None:
            statistics.outputs.update(y)
        if self.kept:
            statistics.means[self._batch] = channel_means(y, layer.kind.channel_axis)
            statistics.output = (self._batch, sample(y))
        return y


class Solve(Stage):
    """Runs the quantized network on kept batches, correcting each bias on the way.

    A layer is corrected before the next one sees its output, so one pass corrects all, and
    the pass's own result is that of the corrected network.

    Args:
        operands: integer operands by layer; replaced as biases change.
        statistics: what `Observe` found.
        corrections: running corrections by layer; empty where none are wanted.

    Attributes:
        errors: by layer, after the last batch.
    """

    def __init__(
        self,
        operands: dict[str, IntegerOperands],
        statistics: dict[str, LayerStatistics],
        corrections: dict[str, BiasCorrection],
    ) -> None:
        self.errors: dict[str, LayerErrors] = {}
        self._operands = operands
        self._statistics = statistics
        self._corrections = corrections
        self._batch = 0
        self._last = False

    def begin(self, batch: int, *, last: bool) -> None:
        """Says which batch comes next, and whether errors are measured on it."""
        self._batch, self._last = batch, last

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The quantized result with the bias as corrected so far."""
        operands = self._operands.get(layer.name)
        if operands is None:
            return call.run(call.x, layer.weight, layer.bias)
        y = operands.run(layer, call)
        statistics = self._statistics[layer.name]
        measured = None
        if self._last and statistics.output is not None and statistics.output[0] == self._batch:
            measured = statistics.output[1]
        correction = self._corrections.get(layer.name)
        means = statistics.means.get(self._batch)
        if correction is None or means is None:
            if measured is not None:
                agreement = Agreement.between(measured, sample(y))
                self.errors[layer.name] = LayerErrors(agreement, agreement, corrected=False)
            return y
        before = correction.change
        uncorrected = sample(_minus(layer, y, before)) if measured is not None else None
        y += layer.per_channel(
            correction.update(means, channel_means(y, layer.kind.channel_axis)).to(y.dtype), y
        )
        if measured is not None and uncorrected is not None:
            was, now = Agreement.between(measured, uncorrected), Agreement.between(measured, sample(y))
            corrected = now.sqnr_db >= was.sqnr_db
            self.errors[layer.name] = LayerErrors(was, now if corrected else was, corrected)
            if not corrected:
                y = _minus(layer, y, correction.change)
                correction.undo()
        bias = integer_bias(correction.bias, operands.dequant_scale)
        self._operands[layer.name] = replace(operands, bias=bias)
        return y


def _minus(layer: CompressedLayer, y: Tensor, change: Tensor) -> Tensor:
    """`y` without a change of the bias."""
    if not torch.any(change):
        return y
    return y - layer.per_channel(change.to(y.dtype), y)
