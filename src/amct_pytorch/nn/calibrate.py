"""The two stages of calibration: observing the float network, then solving it layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from amct_pytorch.algorithms.bias_correction import BiasCorrection
from amct_pytorch.errors import CalibrationError
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.simulate import IntegerOperands, integer_bias
from amct_pytorch.nn.wrapped import CompressedLayer, Stage
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.statistics import Agreement, channel_means, sample


@dataclass
class LayerStatistics:
    """What was observed of one layer in the float network.

    Attributes:
        inputs: histogram of its input over all batches.
        output_low: smallest output over all batches.
        output_high: largest output.
        means: mean of each output channel, by number of the batch kept for solving.
        output: sample of its output on the last batch kept for solving.
    """

    inputs: Histogram = field(default_factory=Histogram)
    outputs: Histogram | None = None
    means: dict[int, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


@dataclass
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

    Attributes:
        batch: number of the present batch.
        kept: whether the present batch will be run again to solve.
    """

    def __init__(self, names: list[str], with_outputs: frozenset[str]) -> None:
        self.statistics = {name: LayerStatistics() for name in names}
        for name in with_outputs:
            self.statistics[name].outputs = Histogram()
        self.batch = 0
        self.kept = False

    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The float result."""
        statistics = self.statistics[layer.name]
        try:
            statistics.inputs.update(call.x)
        except ValueError:
            raise CalibrationError(
                f"the input of layer {layer.name!r} holds NaN or infinity in calibration batch "
                f"{self.batch}; check the calibration data and the layers before this one"
            ) from None
        y = call.run(call.x, layer.weight, layer.bias)
        if statistics.outputs is not None:
            statistics.outputs.update(y)
        if self.kept:
            statistics.means[self.batch] = channel_means(y, layer.kind.channel_axis)
            statistics.output = sample(y)
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
        batch: number of the present batch.
        last: whether it is the last one, on which errors are measured.
        errors: by layer, after the last batch.
    """

    def __init__(
        self,
        operands: dict[str, IntegerOperands],
        statistics: dict[str, LayerStatistics],
        corrections: dict[str, BiasCorrection],
    ) -> None:
        self.operands = operands
        self.batch = 0
        self.last = False
        self.errors: dict[str, LayerErrors] = {}
        self._statistics = statistics
        self._corrections = corrections

    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The quantized result with the bias as corrected so far."""
        operands = self.operands.get(layer.name)
        if operands is None:
            return call.run(call.x, layer.weight, layer.bias)
        y = operands.run(layer, call)
        statistics = self._statistics[layer.name]
        means = statistics.means.get(self.batch)
        correction = self._corrections.get(layer.name)
        original = sample(y) if self.last else None
        shift = None
        if correction is not None and means is not None:
            before = correction.change
            shift = correction.update(means, channel_means(y, layer.kind.channel_axis))
            if original is not None:
                original = sample(y - layer.per_channel(before.to(y.dtype), y))
            y += layer.per_channel(shift.to(y.dtype), y)
        if self.last and statistics.output is not None and original is not None:
            y = self._measure(layer, y, original, statistics.output, correction)
        return y

    def _measure(
        self,
        layer: CompressedLayer,
        y: Tensor,
        uncorrected: Tensor,
        target: Tensor,
        correction: BiasCorrection | None,
    ) -> Tensor:
        """Notes the layer's errors; takes a correction back that made them larger."""
        was = Agreement.between(target, uncorrected)
        now = Agreement.between(target, sample(y)) if correction else was
        if correction is not None and now.sqnr_db < was.sqnr_db:
            y -= layer.per_channel(correction.change.to(y.dtype), y)
            correction.undo()
            self.errors[layer.name] = LayerErrors(was, was, corrected=False)
        else:
            self.errors[layer.name] = LayerErrors(was, now, corrected=correction is not None)
        return y


def apply_correction(layer: CompressedLayer, bias: Tensor, operands: IntegerOperands) -> Tensor:
    """Sets the layer's bias and returns the integer bias that goes with it."""
    layer.bias.data.copy_(bias.to(layer.bias.dtype))
    return integer_bias(layer.bias, operands.dequant_scale)
