"""OFMR: factors by the error of a layer's output instead of its input or weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.formats import Granularity, NumberFormat, fake_quantize, params_of

# Fractions of a range that are tried as the range, the range itself first. Floating formats lose
# little resolution to a range that is too wide and have room beyond their scale, so some are
# octaves apart, with steps in between: where in an octave the largest values fall matters too.
FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.35, 0.25, 0.125, 2.0, 1.41)

Operator = Callable[[Tensor, Tensor], Tensor]
Quantizer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class OfmrResult:
    """Factors, and errors: squared output error over squared output (0 without any output).

    Attributes:
        weight_scale: of the granularity's `scales_shape`.
        input_scale: float32 [1]; None if inputs have none.
        error_extremes: with scales by the extremes of weight and inputs.
        error: with these scales; never above `error_extremes`.
    """

    weight_scale: Tensor
    input_scale: Tensor | None
    error_extremes: float
    error: float


def solve_ofmr(
    weight: Tensor,
    samples: Sequence[Tensor],
    operator: Operator,
    fmt: NumberFormat,
    granularity: Granularity,
    *,
    quantize_input: Quantizer | None = None,
    input_scale: Tensor | None = None,
) -> OfmrResult:
    """Tries fractions of the extremes' scales on the layer: the inputs', then the weight's.

    The inputs' scale is chosen with the weight by its extremes, the weight's then with the
    inputs quantized by that scale; by channel, each output channel has its own choice.

    Args:
        weight: float32, output channels first.
        samples: inputs, float32; one or several shapes.
        operator: gives the output for an input and a weight, without bias, channels last.
        fmt: number format of the weight, without offsets.
        granularity: kind tensor or channel.
        quantize_input: gives an input after quantization with a scale (ignored where scales are
            dynamic); None: inputs are not quantized.
        input_scale: float32 [1], by the extremes of all inputs; None: dynamic.
    """
    meant = [operator(x, weight) for x in samples]
    power = sum(float(y.square().sum(dtype=torch.float64)) for y in meant)
    extremes = params_of(weight, fmt, granularity).scale
    unused = torch.ones(1, device=weight.device)

    def inputs_by(scale: Tensor | None) -> Sequence[Tensor]:
        if quantize_input is None:
            return samples
        return [quantize_input(x, unused if scale is None else scale) for x in samples]

    def errors(inputs: Sequence[Tensor], scale: Tensor) -> Tensor:
        """Squared error of each output channel, float64 [N]."""
        rounded = fake_quantize(weight, scale, None, fmt, granularity)
        return torch.stack(
            [
                (operator(x, rounded) - y).square().flatten(0, -2).sum(0, dtype=torch.float64)
                for x, y in zip(inputs, meant, strict=True)
            ]
        ).sum(0)

    seen = inputs_by(input_scale)
    least = errors(seen, extremes)
    error_extremes = float(least.sum())
    if input_scale is not None:
        by_extremes = input_scale
        for fraction in FRACTIONS[1:]:
            tried = inputs_by(by_extremes * fraction)
            error = errors(tried, extremes)
            if error.sum() < least.sum():
                input_scale, seen, least = by_extremes * fraction, tried, error
    chosen = extremes
    for fraction in FRACTIONS[1:]:
        error = errors(seen, extremes * fraction)
        if granularity.kind == "tensor":
            if error.sum() < least.sum():
                chosen, least = extremes * fraction, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        chosen = torch.where(better.view(chosen.shape), extremes * fraction, chosen)
    total = float(least.sum())
    return OfmrResult(
        chosen,
        input_scale,
        error_extremes / power if power else 0.0,
        total / power if power else 0.0,
    )
