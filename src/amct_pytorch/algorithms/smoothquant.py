"""SmoothQuant: outliers of input channels are moved into the weights.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), section 4, equation 4. Inputs are divided and
weights multiplied by s_j = max|x_j|^a / max|w_j|^(1-a) for each input channel j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def choose_strength(
    input_max: Tensor,
    weight_max: Tensor,
    strength: float,
    tokens: Tensor,
    weight: Tensor,
    quantized_output: Callable[[Tensor], Tensor],
) -> Smoothing:
    """The strength from the one asked for up to 1 with the least output error on a sample.

    With one static scale for all inputs, the few tokens with huge activations decide on the
    resolution that all others get; how much of that the weights can take over differs from
    layer to layer. Errors are relative to each token's own output, or else those few tokens
    would decide here as well.

    Args:
        input_max: max |x_j| over all calibration data, [K].
        weight_max: max |w_j|, [K].
        strength: asked for, in [0, 1].
        tokens: sample of inputs, float32 [tokens, K]; without tokens the strength asked for
            stays.
        weight: float [N, K].
        quantized_output: gives the output [tokens, N] for `tokens` of the layer quantized with
            given factors, without bias.
    """
    tried = [strength + (1 - strength) * step / (STRENGTHS - 1) for step in range(STRENGTHS)]
    factors = [smooth_factors(input_max, weight_max, one) for one in dict.fromkeys(tried)]
    outputs = map(quantized_output, factors)
    best, error, error_asked = least_relative_error(outputs, tokens @ weight.float().T)
    return Smoothing(factors[best], tried[best], error, error_asked)


def least_relative_error(outputs: Iterable[Tensor], meant: Tensor) -> tuple[int, float, float]:
    """Which of several outputs is nearest, each token's error relative to its own output.

    Args:
        outputs: [tokens, N] each.
        meant: float output [tokens, N].

    Returns:
        Index of the best, the first one of equals; its mean relative squared error; the first
        one's. 0 and no errors where no token has an output.
    """
    power = meant.square().sum(1)
    alive = power > 0
    if not bool(alive.any()):
        return 0, 0.0, 0.0
    errors = [
        float(((output - meant).square().sum(1)[alive] / power[alive]).mean()) for output in outputs
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    return best, errors[best], errors[0]
