"""A float64 reference of variational Bayesian matrix factorization, written for clearness only.

Follows Nakajima et al., JMLR 14 (2013): the free energy as a function of the noise variance, by a
full SVD, summed component by component, on a fine grid.
"""

from __future__ import annotations

import numpy as np


def evbmf_rank(matrix: np.ndarray) -> int:
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    small, large = matrix.shape
    energies = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    alpha = small / large
    tau_bar = 2.5129 * np.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    most = int(min(np.ceil(small / (1 + alpha)) - 1, small - 1))
    upper = energies.sum() / (small * large)
    lower = max(energies[most] / (large * x_bar), energies[most:].mean() / large)
    variances = np.exp(np.linspace(np.log(lower), np.log(upper), 20001))
    total = np.zeros_like(variances)
    for energy in energies:
        x = energy / (large * variances)
        total += x - np.log(x)
        root = np.sqrt(np.maximum((x - 1 - alpha) ** 2 - 4 * alpha, 0))
        tau = np.maximum((x - 1 - alpha + root) / 2, 0)
        signal = np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
        total += np.where(x > x_bar, signal, 0)
    variance = variances[total.argmin()]
    return int((energies > large * variance * x_bar).sum())


def truncation_error(matrix: np.ndarray, rank: int) -> float:
    energies = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return float(np.sqrt(energies[rank:].sum() / energies.sum()))
