"""How many components of a matrix are signal: analytic variational Bayes.

S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka: Global analytic solution of fully-observed
variational Bayesian matrix factorization, JMLR 14 (2013), sections 3 and 4. Nothing but the
singular values is needed: given the variance of the noise, a component is kept if its singular
value is above a threshold, and the variance is the minimum of a function of one variable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The threshold solves an equation that has no closed form; this is the paper's fit to it.
TAU_FACTOR = 2.5129
GRID = 256
# The best points of a grid whose neighbourhoods are looked at more closely, and how often.
BEST = 8
REFINEMENTS = 4


@dataclass(frozen=True)
class Evbmf:
    """What the analysis found.

    Attributes:
        rank: number of components that are signal; 0 if all is noise.
        noise_variance: sigma squared, the variance of one entry's noise.
        threshold: energy (squared singular value) above which a component is signal.
    """

    rank: int
    noise_variance: float
    threshold: float


def evbmf(energies: Tensor, rows: int, columns: int) -> Evbmf:
    """Estimates rank and noise of a matrix from all of its squared singular values.

    Args:
        energies: [min(rows, columns)] squared singular values, in any order.
        rows: of the matrix.
        columns: of the matrix.
    """
    energies = energies.detach().double().clamp(min=0).sort(descending=True).values
    small, large = min(rows, columns), max(rows, columns)
    total = float(energies.sum())
    if total == 0.0:
        return Evbmf(0, 0.0, 0.0)
    alpha = small / large
    tau = TAU_FACTOR * math.sqrt(alpha)
    limit = (1 + tau) * (1 + alpha / tau)
    # At most this many components can be signal; the rest bounds the noise from below.
    most = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    upper = total / (small * large)
    lower = max(
        float(energies[most]) / (large * limit),
        float(energies[most:].mean()) / large,
        upper * 1e-14,
    )
    variance = _minimum(energies, large, alpha, limit, lower, max(upper, lower))
    threshold = large * variance * limit
    return Evbmf(int((energies > threshold).sum()), variance, threshold)


def _minimum(
    energies: Tensor, large: int, alpha: float, limit: float, lower: float, upper: float
) -> float:
    """The noise variance between `lower` and `upper` with the least free energy.

    The function has a valley between any two variances at which a component changes sides, so
    the whole range is looked at on a logarithmic grid, then the neighbourhoods of its best
    points on finer ones.
    """
    low, high = math.log(lower), math.log(upper)
    grid = torch.linspace(low, high, GRID, dtype=torch.float64, device=energies.device)
    step = (high - low) / (GRID - 1)
    fine = torch.linspace(-1, 1, GRID // BEST, dtype=torch.float64, device=energies.device)
    for _ in range(REFINEMENTS):
        values = _free_energy(energies, grid.exp(), large, alpha, limit)
        best = grid[values.argsort(stable=True)[:BEST]]
        grid = (best[:, None] + step * fine).flatten().clamp(low, high)
        step *= 2 / (len(fine) - 1)
    return math.exp(float(best[0]))


def _free_energy(
    energies: Tensor, variances: Tensor, large: int, alpha: float, limit: float
) -> Tensor:
    """Free energy at each of `variances`, up to a constant that does not depend on them."""
    noise = len(energies) * variances.log() + energies.sum() / (large * variances)
    # Only components above the threshold of the smallest variance can ever be signal.
    candidates = energies[energies > limit * large * variances.min()]
    x = candidates[None, :] / (large * variances[:, None])
    distance = x - (1 + alpha)
    tau = (distance + (distance**2 - 4 * alpha).clamp(min=0).sqrt()).clamp(min=0) / 2
    gain = torch.log1p(tau) + alpha * torch.log1p(tau / alpha) - tau
    return noise + torch.where(x > limit, gain, torch.zeros_like(gain)).sum(dim=1)
