"""A quantized layer as it will be deployed: integers in, integers summed, one rescale out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.graph.tensors import in_float64, result_dtype, without_autocast
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.wrapped import CompressedLayer, LayerStandIn, Stage
from amct_pytorch.record.factors import LayerFactors


@dataclass(frozen=True)
class IntegerOperands:
    """What a layer's call is run with when it computes on integers held in floats.

    The numbers are those of the deploy model: the input is multiplied by the float32
    1 / scale_d, the bias rounded at scale_w * scale_d, the sum multiplied by the float32
    product of the scales.

    Attributes:
        activation: format of the input.
        inverse_scale: float32 1 / scale_d.
        offset: zero point of the input.
        weight: int8.
        dequant_scale: float32 factor of the integer sums, [1] or [out_channels].
        bias_scale: float32 scale_w * scale_d, the unit of the bias, likewise.
        bias: integer values, float64 [out_channels], on the CPU.
    """

    activation: IntFormat
    inverse_scale: float
    offset: int
    weight: Tensor
    dequant_scale: Tensor
    bias_scale: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, layer: CompressedLayer, factors: LayerFactors, weight: Tensor | None = None
    ) -> IntegerOperands:
        """The operands of `layer` under complete `factors`.

        Args:
            layer: the layer.
            factors: its factors.
            weight: int8 weight; None: the layer's own, rounded to the nearest.
        """
        return cls.on(
            layer.weight.detach(), layer.bias, factors, layer.layout, integer_weight=weight
        )

    @classmethod
    def on(
        cls,
        weight: Tensor,
        bias: Tensor,
        factors: LayerFactors,
        layout: WeightLayout | None,
        *,
        integer_weight: Tensor | None = None,
    ) -> IntegerOperands:
        """The operands of a layer with these float ones.

        Args:
            weight: after fusion.
            bias: likewise.
            factors: complete.
            layout: of the weight; None for a layer without weights.
            integer_weight: int8; None: `weight` rounded to the nearest.
        """
        assert factors.scale_d is not None
        device = weight.device
        scale_w = torch.tensor(factors.scale_w, dtype=torch.float32).to(device)
        scale_d = torch.tensor(factors.scale_d, dtype=torch.float32)
        if integer_weight is None:
            along = layout.along_channels(scale_w, weight.shape) if layout else scale_w
            integers = IntFormat(factors.weight_bits).quantize(weight.float(), along)
            integer_weight = integers.to(torch.int8)
        bias_scale = torch.from_numpy(factors.bias_scale()).to(device)
        return cls(
            IntFormat(factors.activation_bits),
            float(torch.tensor(1.0) / scale_d),
            factors.offset_d,
            integer_weight,
            torch.from_numpy(factors.dequant_scale()).to(device),
            bias_scale,
            integer_bias(bias, bias_scale),
        )

    def quantized_input(self, x: Tensor) -> Tensor:
        """(q - offset) of the input."""
        return self.activation.steps_by_inverse(x, self.inverse_scale, self.offset)

    def run(self, layer: LayerStandIn, call: LayerCall) -> Tensor:
        """The call's result, in the type that it has in the float network."""
        bias = self.bias.float().to(call.x.device)
        # Integers up to 2^24 are exact in float32 and in nothing that autocast would choose.
        with without_autocast(call.x.device.type):
            # int8 is kept, and floats made of it for each call: a quarter of the memory.
            sums = call.run(self.quantized_input(call.x), self.weight.float(), bias)
        if call.weight is not None and sums.device.type != "cpu":
            # Other devices may choose an algorithm that computes with fractions (Winograd's).
            sums.round_()
        sums.mul_(layer.per_channel(self.dequant_scale.to(sums.device), sums))
        return sums.to(call.x.dtype if call.weight is None else result_dtype(call.x))


def integer_bias(bias: Tensor, bias_scale: Tensor) -> Tensor:
    """round(bias / (scale_w * scale_d)), half to even, float64 on the CPU."""
    return torch.round(in_float64(bias) / in_float64(bias_scale))


R = TypeVar("R")
P = ParamSpec("P")


def without_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` without gradients and outside the caller's inference mode.

    What it keeps is then an ordinary tensor, which may be changed later in any mode.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


class Simulate(Stage):
    """Runs each layer's call on its integer operands."""

    def __init__(self, operands: dict[str, IntegerOperands]) -> None:
        self._operands = operands

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The quantized result; the float one for a layer without operands."""
        operands = self._operands.get(layer.name)
        if operands is None:
            return layer.float_result(call)
        return operands.run(layer, call)
