"""SmoothQuant: outliers of input channels are moved into the weights.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), section 4, equation 4. Inputs are divided and
weights multiplied by s_j = max|x_j|^a / max|w_j|^(1-a) for each input channel j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.errors import ArgumentValueError

# How many strengths are tried from the one asked for up to 1.
STRENGTHS = 6


def smooth_factors(input_max: Tensor, weight_max: Tensor, strength: float) -> Tensor:
    """What inputs are divided and weights multiplied by, float32 [K], positive and finite.

    A channel whose inputs were all 0 gets the factor that brings its weights to the median of
    the others' smoothed weights; one whose weights are all 0, its inputs to the median of the
    others' smoothed inputs; so that neither becomes an outlier. Where both are 0 the factor is
    the others' geometric mean, and without others all are 1.

    Args:
        input_max: max |x_j|, [K].
        weight_max: max |w_j| over output channels, [K].
        strength: a in [0, 1]; 1 moves all of an input's range into the weights.

    Raises:
        ArgumentValueError: for a strength out of range, or maxima that are negative or not finite.
    """
    if not 0 <= strength <= 1:
        raise ArgumentValueError(f"strength is {strength}; allowed are 0 to 1")
    for name, maxima in (("input_max", input_max), ("weight_max", weight_max)):
        if not bool((maxima.isfinite() & (maxima >= 0)).all()):
            raise ArgumentValueError(f"{name} holds NaN, infinity or a negative number")
    x, w = input_max.float(), weight_max.float()
    tiny = torch.finfo(torch.float32).tiny
    has_x, has_w = x > tiny, w > tiny
    both = has_x & has_w
    if not bool(both.any()):
        return torch.ones_like(x)
    # In logarithms, where no quotient overflows.
    log_x, log_w = x.clamp(min=tiny).log(), w.clamp(min=tiny).log()
    logs = strength * log_x - (1 - strength) * log_w
    usual_x, usual_w = (log_x - logs)[both].median(), (log_w + logs)[both].median()
    logs = torch.where(both, logs, logs[both].mean())
    logs = torch.where(has_w & ~has_x, usual_w - log_w, logs)
    logs = torch.where(has_x & ~has_w, log_x - usual_x, logs)
    # Beyond these a factor, or its inverse squared, would not be a normal float32.
    return logs.clamp(-40, 40).exp()


@dataclass(frozen=True)
class Smoothing:
    """The factors chosen.

    Attributes:
        factors: float32 [K].
        strength: that they were computed with.
        error: mean over tokens of squared output error over squared output.
        error_asked: the same with the strength asked for; never below `error`.
    """

    factors: Tensor
    strength: float
    error: float
    error_asked: float


@dataclass(frozen=True)
class SmoothedLayer:
    """One of the layers that share an input.

    Attributes:
        meant: float output for a sample of inputs, without bias, [tokens, N].
        quantized: gives the output [tokens, N] for the same inputs of the layer quantized with
            given factors, without bias.
    """

    meant: Tensor
    quantized: Callable[[Tensor], Tensor]


def choose_strength(
    input_max: Tensor, weight_max: Tensor, strength: float, layers: Sequence[SmoothedLayer]
) -> Smoothing:
    """The strength from the one asked for up to 1 with the least output error on a sample.

    With one static scale for all inputs, the few tokens with huge activations decide on the
    resolution that all others get; how much of that the weights can take over differs from
    layer to layer. Errors are relative to each token's own output, or else those few tokens
    would decide here as well.

    Args:
        input_max: max |x_j| over all calibration data, [K].
        weight_max: max |w_j| over the output channels of all layers, [K].
        strength: asked for, in [0, 1].
        layers: those that share the input; the mean of their errors decides. If the sample has
            no token, the strength asked for stays.
    """
    tried = [strength + (1 - strength) * step / (STRENGTHS - 1) for step in range(STRENGTHS)]
    tried = list(dict.fromkeys(tried))
    factors = [smooth_factors(input_max, weight_max, one) for one in tried]
    found = [relative_errors(map(layer.quantized, factors), layer.meant) for layer in layers]
    errors = [of_layer for of_layer in found if of_layer]
    means = [sum(one) / len(errors) for one in zip(*errors, strict=True)] or [0.0]
    best = min(range(len(means)), key=means.__getitem__)
    return Smoothing(factors[best], tried[best], means[best], means[0])


def relative_errors(outputs: Iterable[Tensor], meant: Tensor) -> list[float]:
    """How far outputs are from what is meant, each token's error relative to its own output.

    Args:
        outputs: [tokens, N] each.
        meant: float output [tokens, N].

    Returns:
        Means over tokens of squared error over squared output, one an output; none where no token
        has an output.
    """
    power = meant.square().sum(1)
    alive = power > 0
    if not bool(alive.any()):
        return []
    return [
        float(((output - meant).square().sum(1)[alive] / power[alive]).mean()) for output in outputs
    ]
