"""Learning for each weight of a unit whether it is rounded up or down (see `ada_round`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.algorithms.unit import Unit
from amct_pytorch.formats import IntFormat

ZETA, GAMMA = 1.1, -0.1
# Rows of one step of learning, about, and its rate.
STEP_ROWS = 256
RATE = 0.03
# The regularisation of a channel in units of its error, for reg_param 1.
REGULARISATION = 1000.0
# Every so many steps it is asked whether next to no weight is between up and down any more.
ASK_EVERY = 50
SETTLED, FEW = 0.02, 1e-3


@dataclass(frozen=True)
class AdaSettings:
    """What a config says of ADA.

    Attributes:
        iterations: steps of learning at most.
        regularisation: lambda.
        beta: where beta starts and ends.
        warm_start: the part of the steps before the regularisation begins.
    """

    iterations: int = 10000
    regularisation: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2


@dataclass(frozen=True)
class Learned:
    """What learning ended with.

    Attributes:
        steps: rounded weights in units of their scale, [groups, K, channels of a group].
        bias: [channels].
        iterations: that were made.
    """

    steps: Tensor
    bias: Tensor
    iterations: int


def learn_rounding(
    unit: Unit,
    scale: Tensor,
    steps: Tensor,
    bias: Tensor,
    errors: Tensor,
    fmt: IntFormat,
    settings: AdaSettings,
) -> Learned:
    """Adam on relaxed rounding, from a rounding that is known.

    Args:
        unit: the layer and its data.
        scale: [channels] or [1].
        steps: the known rounding; a weight may end one step beside where it is here.
        bias: to start from, [channels].
        errors: of the known rounding, [channels]: every channel's loss is in units of them.
        fmt: the integers.
        settings: of the learning.
    """
    _, rows, size = unit.inputs.shape
    generator = torch.Generator().manual_seed(0)
    # In a random order once, so that the rows of a step lie side by side: picking them one by one
    # takes longer than all else in a depthwise layer.
    order = torch.randperm(rows, generator=generator).to(unit.inputs.device)
    mixed = unit.of_rows(order)
    parts = max(1, round(rows / STEP_ROWS))
    spread = unit.per_channel(scale)
    exact = unit.weight / spread
    # Weights that feedback has moved by a step or more have left their own two neighbours.
    around = torch.where((steps - exact).abs() < 1, exact, steps)
    floor = around.floor()
    start = 0.5 * (around - floor) + 0.5 * (steps - floor)
    alpha = torch.logit((start.clamp(1e-3, 1 - 1e-3) - GAMMA) / (ZETA - GAMMA)).requires_grad_()
    # Biases in units of what the output is off by, so that one rate fits all.
    bias_unit = errors.sqrt().clamp(min=1e-12)
    shift = torch.zeros_like(bias).requires_grad_()
    importance = 1 / (errors + 1e-3 * errors.mean().clamp(min=1e-20))
    optimizer = torch.optim.Adam([alpha, shift], lr=RATE)
    warm = int(settings.warm_start * settings.iterations)
    first, last = settings.beta
    made = 0
    with torch.enable_grad():
        for made in range(1, settings.iterations + 1):
            part = made % parts
            chosen = slice(part * rows // parts, (part + 1) * rows // parts)
            soft = _soft(alpha).clamp(0, 1)
            weight = (floor + soft).clamp(fmt.qmin, fmt.qmax) * spread
            y = mixed.outputs(weight, chosen) + bias + shift * bias_unit
            error = mixed.errors(y, chosen)
            loss = ((error + unit.ridge(weight)) * importance).sum()
            if made > warm:
                gone = (made - warm) / (settings.iterations - warm)
                beta = last + 0.5 * (first - last) * (1 + math.cos(gone * math.pi))
                between = 1 - (2 * soft - 1).abs().pow(beta)
                loss = loss + REGULARISATION * settings.regularisation / size * between.sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if made > warm and made % ASK_EVERY == 0 and _settled(soft):
                break
    hard = (floor + (_soft(alpha.detach()) >= 0.5)).clamp(fmt.qmin, fmt.qmax)
    return Learned(hard, bias + shift.detach() * bias_unit, made)


def _soft(alpha: Tensor) -> Tensor:
    """h before it is clipped (equation 23)."""
    return torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA


def _settled(soft: Tensor) -> bool:
    between = (soft.detach() - 0.5).abs() < 0.5 - SETTLED
    return float(between.float().mean()) < FEW
