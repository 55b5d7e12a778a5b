"""How many components of a matrix are signal: analytic variational Bayes.

S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka: Global analytic solution of fully-observed
variational Bayesian matrix factorization, JMLR 14 (2013), sections 3 and 4. Nothing but the
singular values is needed: given the variance of the noise, a component is kept if its singular
value is above a threshold, and the variance is the minimum of a function of one variable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The threshold solves an equation that has no closed form; this is the paper's fit to it.
TAU_FACTOR = 2.5129
GRID = 256
# The best points of a grid whose neighbourhoods are looked at more closely, and how often.
BEST = 8
REFINEMENTS = 4
# Points of the grids on which the free energy is bounded from below.
BOUND_GRID = 128
SLOPES = 48


@dataclass(frozen=True)
class Evbmf:
    """What the analysis found.

    Attributes:
        rank: number of components that are signal; 0 if all is noise.
        noise_variance: sigma squared, the variance of one entry's noise.
        threshold: energy (squared singular value) above which a component is signal.
        at_least: whether only so much is known that the rank is not below `rank`.
    """

    rank: int
    noise_variance: float
    threshold: float
    at_least: bool = False


def evbmf(energies: Tensor, rows: int, columns: int) -> Evbmf:
    """Estimates rank and noise of a matrix from all of its squared singular values.

    Args:
        energies: [min(rows, columns)] squared singular values, in any order.
        rows: of the matrix.
        columns: of the matrix.
    """
    energies = energies.detach().double().clamp(min=0).sort(descending=True).values
    small, large, alpha, limit = _constants(rows, columns)
    total = float(energies.sum())
    if total == 0.0:
        return Evbmf(0, 0.0, 0.0)
    # At most this many components can be signal; the rest bounds the noise from below.
    most = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    upper = total / (small * large)
    lower = max(
        float(energies[most]) / (large * limit),
        float(energies[most:].mean()) / large,
        upper * 1e-14,
    )
    variance = _minimum(energies, total, small, large, lower, max(upper, lower))
    threshold = large * variance * limit
    return Evbmf(int((energies > threshold).sum()), variance, threshold)


def evbmf_leading(
    leading: Tensor,
    total: float,
    squares: float,
    rows: int,
    columns: int,
    *,
    enough: int,
    uncertainty: float,
) -> Evbmf | None:
    """The same from the leading energies alone, where they decide.

    Above the variance whose threshold is the last known energy, the free energy is known.
    Below, it has a lower bound: the unknown energies are none above the last known one, and
    their sum and sum of squares are known.

    Args:
        leading: [k] largest squared singular values, descending.
        total: sum of all.
        squares: sum of the squares of all.
        rows: of the matrix.
        columns: of the matrix.
        enough: a rank from which on `at_least` will do, below k.
        uncertainty: error that an energy may have; noise weaker than that is not looked for.

    Returns:
        What `evbmf` finds with all energies; with `at_least`, a lower bound from `enough` on;
        None: the leading energies do not decide.
    """
    leading = leading.detach().double()
    small, large, _, limit = _constants(rows, columns)
    upper, known = total / (small * large), float(leading[-1]) / (large * limit)
    if not 0 < known < upper:
        return None
    variance = _minimum(leading, total, small, large, known, upper)
    threshold = large * variance * limit
    rank = int((leading > threshold).sum())
    tail = total - float(leading.sum()), squares - float((leading**2).sum())
    least = float(_free_energy(leading, _one(variance), total, small, large, limit))
    weakest = uncertainty / (large * limit)
    lowest = _lowest_below(leading, weakest, max(tail[0], 0.0), max(tail[1], 0.0), small, large)
    # The search for the rank begins no lower than the mean of the weaker half, which is at most
    # that of all unknown energies.
    begins = max(tail[0], 0.0) / ((small - len(leading)) * large)
    if lowest > least and variance > begins:
        return Evbmf(rank, variance, threshold)
    # A lower minimum elsewhere would be at a smaller variance, and so at a higher rank.
    return Evbmf(rank, variance, threshold, at_least=True) if rank >= enough else None


def _lowest_below(
    leading: Tensor, weakest: float, tail: float, tail_squares: float, small: int, large: int
) -> float:
    """Lower bound of the free energy at variances too small to know it, from `weakest` on.

    The gain of an unknown component with x = energy / (large * variance) is at most a x + b x^2
    for any a and b >= 0 with which that holds up to the last known energy; sums of x and x^2 are
    known, and of all b the best is taken.
    """
    alpha, limit = _constants(small, large)[2:]
    last, total = float(leading[-1]), float(leading.sum()) + tail
    known = last / (large * limit)
    options: dict[str, Any] = {"dtype": torch.float64, "device": leading.device}
    span = min(math.log(weakest / known), 0.0) if weakest > 0 else math.log(1e-14)
    variances = known * torch.linspace(span, 0, BOUND_GRID, **options).exp()
    energies = last * torch.linspace(1 / BOUND_GRID, 1, BOUND_GRID, **options)
    x = energies[None, :] / (large * variances[:, None])
    gain_by_x = -_gain(x, alpha, limit) / x
    slopes = torch.cat([torch.zeros(1, **options), torch.logspace(-5, 0.3, SLOPES, **options)])
    slope = slopes[None, :, None] / x[:, None, -1:]
    offset = (gain_by_x[:, None, :] - slope * x[:, None, :]).amax(dim=2).clamp(min=0)
    scale = 1 / (large * variances[:, None])
    bound = offset * tail * scale + slope[:, :, 0] * tail_squares * scale**2
    free = _free_energy(leading, variances, total, small, large, limit)
    return float((free - bound.amin(dim=1)).min())


def _constants(rows: int, columns: int) -> tuple[int, int, float, float]:
    """Smaller and larger side, their ratio, and the x above which a component is signal."""
    small, large = min(rows, columns), max(rows, columns)
    alpha = small / large
    tau = TAU_FACTOR * math.sqrt(alpha)
    return small, large, alpha, (1 + tau) * (1 + alpha / tau)


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _minimum(
    energies: Tensor, total: float, small: int, large: int, lower: float, upper: float
) -> float:
    """The noise variance between `lower` and `upper` with the least free energy.

    The function has a valley between any two variances at which a component changes sides, so
    the whole range is looked at on a logarithmic grid, then the neighbourhoods of its best
    points on finer ones.
    """
    limit = _constants(small, large)[3]
    low, high = math.log(lower), math.log(upper)
    grid = torch.linspace(low, high, GRID, dtype=torch.float64, device=energies.device)
    step = (high - low) / (GRID - 1)
    fine = torch.linspace(-1, 1, GRID // BEST, dtype=torch.float64, device=energies.device)
    for _ in range(REFINEMENTS):
        values = _free_energy(energies, grid.exp(), total, small, large, limit)
        best = grid[values.argsort(stable=True)[:BEST]]
        grid = (best[:, None] + step * fine).flatten().clamp(low, high)
        step *= 2 / (len(fine) - 1)
    return math.exp(float(best[0]))


def _free_energy(
    energies: Tensor, variances: Tensor, total: float, small: int, large: int, limit: float
) -> Tensor:
    """Free energy at each of `variances`, up to a constant that does not depend on them.

    Args:
        energies: all that can be signal at these variances.
        variances: of the noise.
        total: sum of all energies.
        small: the matrix's smaller side.
        large: the larger.
        limit: the x above which a component is signal.
    """
    variances = variances.to(energies.device)
    noise = small * variances.log() + total / (large * variances)
    # Only components above the threshold of the smallest variance can ever be signal.
    candidates = energies[energies > limit * large * variances.min()]
    x = candidates[None, :] / (large * variances[:, None])
    return noise + _gain(x, small / large, limit).sum(dim=1)


def _gain(x: Tensor, alpha: float, limit: float) -> Tensor:
    """By how much taking a component as signal changes the free energy; 0 up to the limit."""
    distance = x - (1 + alpha)
    tau = (distance + (distance**2 - 4 * alpha).clamp(min=0).sqrt()).clamp(min=0) / 2
    gain = torch.log1p(tau) + alpha * torch.log1p(tau / alpha) - tau
    return torch.where(x > limit, gain, torch.zeros_like(gain))
