"""ADA: weights are rounded up or down as the output of the layer and its activation asks for.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv
2004.10568), sections 3.2 to 3.4, equations 21 to 25: with V the learned rounding,

    min over V of  |f(W x) - f(W' x')|^2 + lambda sum(1 - |2 h(V) - 1|^beta),
    W' = s clip(floor(W / s) + h(V)),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1),

where x' is the input in the network whose earlier layers are quantized already and f the
activation behind the layer. Learning starts from what error feedback finds (see
`unit_rounding`), which for a layer without an activation is the better answer and the end. Scales
are chosen by the same error, the bias takes part, and a ridge keeps what few rows of data cannot
tell near to the weights. A channel keeps what has the least error of all; what was learned it
takes only if that has less error on rows that were not learned from, too: a few images can be
fitted in ways that help no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amct_pytorch.algorithms.ada_learning import AdaSettings, learn_rounding
from amct_pytorch.algorithms.unit import Unit, best_bias
from amct_pytorch.algorithms.unit_rounding import round_with_feedback
from amct_pytorch.formats import IntFormat

# Of the range of a channel's weights, for its scale.
SHRINKS = tuple(1.0 - 0.025 * i for i in range(13))
LOW_BIT_SHRINKS = tuple(1.0 - 0.04 * i for i in range(18))
LOW_BITS = 4
# Rows on which scales are compared.
SCALE_ROWS = 1024
# Learning goes in rounds of so many steps; another one follows one that was worth it.
ROUND = 500
WORTH = 0.99
# The part of the rows that is learned from; the others, of the last items, say whether it holds.
LEARNED_ROWS = 0.75


@dataclass(frozen=True)
class Rounded:
    """What ADA made of a unit.

    Attributes:
        scale: [channels] or [1].
        steps: weights in units of their scale, integers held in float32, [groups, K, channels].
        bias: [channels].
        error: squared error of f's result in units of its power, both over all channels.
        error_nearest: that of nearest rounding with the scale that spans the weights and the
            layer's own bias.
        iterations: steps of learning that were made.
    """

    scale: Tensor
    steps: Tensor
    bias: Tensor
    error: float
    error_nearest: float
    iterations: int


def ada_round(
    unit: Unit, scale: Tensor, least_scale: Tensor, fmt: IntFormat, settings: AdaSettings
) -> Rounded:
    """Chooses scales, rounding and bias of one unit.

    Args:
        unit: the layer and its data.
        scale: what spans the weights, [channels] or [1] for one scale for all.
        least_scale: that no scale may be below, likewise.
        fmt: the integers to round to.
        settings: of the learning.
    """
    shrinks = SHRINKS if fmt.bits > LOW_BITS else LOW_BIT_SHRINKS
    best = _Choice.of(unit, scale, unit.nearest(scale, fmt))
    own_bias = unit.outputs(best.steps * unit.per_channel(scale)) + unit.bias
    error_nearest = unit.loss(unit.errors(own_bias))
    shrunk = _best_scale(unit, scale, least_scale, fmt, shrinks)
    best = best.or_better(unit, _Choice.of(unit, shrunk, unit.nearest(shrunk, fmt)))
    fed_scale, fed = round_with_feedback(unit, fmt, shrinks, one_scale=scale.numel() == 1)
    allowed = fed_scale >= least_scale
    if scale.numel() > 1 or bool(allowed):
        best = best.or_better(unit, _Choice.of(unit, fed_scale, fed), allowed)
    made = 0
    aim = unit if fmt.bits <= LOW_BITS else _own_errors_only(unit)
    cut = round(unit.inputs.shape[1] * LEARNED_ROWS)
    aim, others = aim.of_rows(slice(cut)), unit.of_rows(slice(cut, None))
    while unit.activation is not None and made < settings.iterations:
        some = replace(settings, iterations=min(ROUND, settings.iterations - made))
        errors = aim.errors(best.outputs(aim))
        learned = learn_rounding(aim, best.scale, best.steps, best.bias, errors, fmt, some)
        made += learned.iterations
        before = best.loss(unit)
        found = _Choice.of(unit, best.scale, learned.steps, learned.bias)
        holds = others.errors(found.outputs(others)) < others.errors(best.outputs(others))
        best = best.or_better(unit, found, holds)
        if best.loss(unit) > WORTH * before:
            break
    return Rounded(best.scale, best.steps, best.bias, best.loss(unit), error_nearest, made)


@dataclass(frozen=True)
class _Choice:
    """One rounding, with the best bias for it and the errors that remain, by channel."""

    scale: Tensor
    steps: Tensor
    bias: Tensor
    errors: Tensor

    @classmethod
    def of(cls, unit: Unit, scale: Tensor, steps: Tensor, *biases: Tensor) -> _Choice:
        bias, errors = best_bias(unit, steps * unit.per_channel(scale), *biases)
        return cls(scale, steps, bias, errors)

    def outputs(self, unit: Unit) -> Tensor:
        """Of the unit with this rounding and bias, before f, [rows, channels]."""
        return unit.outputs(self.steps * unit.per_channel(self.scale)) + self.bias

    def loss(self, unit: Unit) -> float:
        """Error of all channels in units of the power of what is wanted."""
        return unit.loss(self.errors)

    def or_better(self, unit: Unit, other: _Choice, allowed: Tensor | None = None) -> _Choice:
        """The better of two in each channel, or, where all share a scale that differs, of all."""
        better = other.errors < self.errors
        if allowed is not None:
            better = better & allowed
        if self.scale.numel() == 1 and not torch.equal(self.scale, other.scale):
            return other if other.loss(unit) < self.loss(unit) else self
        scale = self.scale
        if scale.numel() > 1:
            scale = torch.where(better, other.scale, scale)
        return _Choice(
            scale,
            torch.where(unit.per_channel(better), other.steps, self.steps),
            torch.where(better, other.bias, self.bias),
            torch.where(better, other.errors, self.errors),
        )


def _own_errors_only(unit: Unit) -> Unit:
    """The unit with targets that its own float weights reach on the quantized network's input.

    Learned rounding then makes up for its own errors and not for those of the layers before.
    With 8 bits those are small, and what makes up for them on a few images does not on others
    (EfficientNet-Lite0, 32 crops of 8 photos to calibrate on, SQNR on others: 25.7 dB, and 24.2
    with the float network's targets); with 4 bits they are what matters (6.6 and 8.4 dB).
    """
    y = unit.outputs(unit.weight)
    return replace(unit, targets=y + (unit.targets - y).mean(0))


def _best_scale(
    unit: Unit,
    spanning: Tensor,
    least_scale: Tensor,
    fmt: IntFormat,
    shrinks: tuple[float, ...],
) -> Tensor:
    """The shrunk scale whose nearest rounding has the least output error."""
    rows = unit.some_rows(SCALE_ROWS)
    targets = unit.targets[rows]
    best, least = spanning, None
    for shrink in shrinks:
        scale = torch.maximum(spanning * shrink, least_scale)
        weight = unit.nearest(scale, fmt) * unit.per_channel(scale)
        y = unit.outputs(weight, rows)
        # A shift of the mean is what the bias is for.
        error = unit.errors(y + (targets - y).mean(0), rows) + unit.ridge(weight)
        if spanning.numel() == 1:
            error = error.sum().reshape(1)
        if least is None:
            best, least = scale, error
            continue
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best
