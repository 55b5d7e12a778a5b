"""OFMR: factors by the error of a layer's output instead of its input or weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Fractions of a range that are tried as the range. Floating formats lose little resolution to a
# range that is too wide and have room beyond their scale, so theirs are spread over octaves, with
# steps in between: where in an octave the largest values fall matters as well.
FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.35, 0.25, 0.125, 2.0, 1.41)


def choose_scale(
    scale: Tensor, meant: Tensor, quantized_output: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """The multiple of a scale whose output error is least.

    Args:
        scale: float32 [1], by the extremes; the first candidate, so the result is never worse.
        meant: float output, any shape.
        quantized_output: the output, of the same shape, for a scale [1].

    Returns:
        The scale, and its squared output error over the squared output (0 for no output).
    """
    power = float(meant.square().sum())
    best, least = scale, float("inf")
    for fraction in FRACTIONS:
        tried = scale * fraction
        error = float((quantized_output(tried) - meant).square().sum())
        if error < least:
            best, least = tried, error
    return best, least / power if power else 0.0
