"""The two stages of calibration: observing the float network, then checking the quantized one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amct_pytorch.algorithms.bias_correction import output_shift
from amct_pytorch.errors import CalibrationError
from amct_pytorch.graph.tensors import in_float64, without_autocast
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.reconstruct import FloatRows
from amct_pytorch.nn.simulate import IntegerOperands, integer_bias, without_autograd
from amct_pytorch.nn.wrapped import CompressedLayer, Stage
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.mean_input import MeanInput
from amct_pytorch.observers.statistics import Agreement, LayerStatistics, sample, sampled_channels


class Observe(Stage):
    """Runs the float network and collects `LayerStatistics`.

    Args:
        names: the layers.
        with_outputs: those whose output range is wanted too.
        rows: takes samples of the outputs, where weights are to be learned.
        with_means: whether mean inputs are wanted, to correct biases.

    Attributes:
        statistics: by layer.
        calls: the last call of each layer that ran, with an empty tensor as its input.
        batch: number of the present batch.
        last: whether it is the last one, whose outputs are sampled.
    """

    def __init__(
        self,
        names: Iterable[str],
        with_outputs: frozenset[str],
        rows: FloatRows | None = None,
        *,
        with_means: bool,
    ) -> None:
        self._rows = rows
        self.statistics = {
            name: LayerStatistics(
                outputs=Histogram() if name in with_outputs else None,
                mean_input=MeanInput() if with_means else None,
            )
            for name in names
        }
        self.calls: dict[str, LayerCall] = {}
        self.batch = 0
        self.last = False

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The float result."""
        statistics = self.statistics[layer.name]
        self._count(statistics.inputs, call.x, f"the input of layer {layer.name!r}")
        if statistics.mean_input is not None and layer.layout is not None:
            statistics.mean_input.update(call.x, channels_last=layer.kind.channel_axis == -1)
        self.calls[layer.name] = replace(call, x=call.x.new_empty(0))
        y = layer.float_result(call)
        statistics.output_shape = tuple(y.shape)
        if statistics.outputs is not None:
            self._count(statistics.outputs, y, f"the output of layer {layer.name!r}")
        if self.last:
            statistics.output = sample(y)
        if self._rows is not None:
            self._rows.take(layer, y)
        return y

    def _count(self, histogram: Histogram, x: Tensor, what: str) -> None:
        try:
            histogram.update(x)
        except ValueError:
            raise CalibrationError(
                f"{what} holds NaN or infinity in calibration batch {self.batch + 1}; check the "
                "calibration data and the layers before this one"
            ) from None


@without_autograd
def corrected_bias(
    layer: CompressedLayer,
    operands: IntegerOperands,
    call: LayerCall,
    mean_input: MeanInput,
    limit: int,
) -> Tensor:
    """The layer's bias with the mean error of its rounded weights taken out.

    Args:
        layer: the layer, with its float weight and bias.
        operands: its integer operands.
        call: its call, for everything but the operands.
        mean_input: mean of its float input.
        limit: largest |integer bias|.

    Returns:
        float64 [out_channels], on the CPU.
    """
    weight_scale = layer.per_output(operands.bias_scale * operands.inverse_scale)
    rounding_error = operands.weight * weight_scale - layer.weight.float()
    with without_autocast(rounding_error.device.type):
        shift = output_shift(
            mean_input,
            # Means that processes have added up are on the CPU.
            lambda mean: call.run(mean.to(rounding_error.device), rounding_error, None),
            layer.kind.channel_axis,
        )
    largest = limit * in_float64(operands.bias_scale)
    return torch.clamp(in_float64(layer.bias) - shift, -largest, largest)


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


class Check(Stage):
    """Runs the quantized network on the last batch, measuring every layer on the way.

    A corrected bias that makes its layer's error larger is taken back before the next layer
    sees the output.

    Args:
        operands: integer operands by layer, with corrected biases; changed where one is
            taken back.
        statistics: what `Observe` found.
        changes: corrected minus original bias by layer; empty where none was corrected.

    Attributes:
        errors: by layer.
    """

    def __init__(
        self,
        operands: dict[str, IntegerOperands],
        statistics: dict[str, LayerStatistics],
        changes: dict[str, Tensor],
    ) -> None:
        self.errors: dict[str, LayerErrors] = {}
        self._operands = operands
        self._statistics = statistics
        self._changes = changes

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The quantized result with the bias that will be deployed."""
        operands = self._operands.get(layer.name)
        if operands is None:
            return layer.float_result(call)
        y = operands.run(layer, call)
        target = self._statistics[layer.name].output
        if target is None:
            return y
        sampled = sample(y)
        now = Agreement.between(target, sampled)
        change = self._changes.get(layer.name)
        if change is None:
            self.errors[layer.name] = LayerErrors(now, now, corrected=False)
            return y
        change = change.float().to(y.device)
        shift = change[sampled_channels(y, layer.kind.channel_axis)]
        was = Agreement.between(target, sampled - shift)
        corrected = now.sqnr_db >= was.sqnr_db
        self.errors[layer.name] = LayerErrors(was, now if corrected else was, corrected)
        if corrected:
            return y
        bias = integer_bias(layer.bias, operands.bias_scale)
        self._operands[layer.name] = replace(operands, bias=bias)
        return y - layer.per_channel(change.to(y.dtype), y)
