"""Weights that make up for what the quantized layers before have done to the input."""

from __future__ import annotations

from torch import Tensor

from amct_pytorch.algorithms.error_feedback import factorize


def correction(hessian: Tensor, crossed: Tensor, damping: float = 0.3) -> Tensor | None:
    """What takes a weight W to the one whose outputs on quantized inputs are nearest: W + W P.

    Asymmetric calibration (GPTAQ, arXiv 2504.02692) asks for min ‖W X - V X̂‖². Its
    solution before rounding is V = W + W (X - X̂) X̂ᵀ (X̂ X̂ᵀ)⁻¹, and rounding V under X̂ X̂ᵀ is
    the rest of the problem. Damping keeps V near W: the correction is fitted to the calibration
    data, and without damping it fits their noise as well.

    Args:
        hessian: mean of x̂ x̂ᵀ over tokens, [K, K], x̂ the input behind quantized layers.
        crossed: mean of (x - x̂) x̂ᵀ over the same tokens, [K, K], x the input in the float
            model. P is in proportion to it: with the sum over tokens P comes out as much larger.
        damping: as a fraction of the mean of the Hessian's diagonal. 0.3 left the least
            divergence on a language model of 0.03, 0.1 and 0.3.

    Returns:
        P, float32 [K, K], the same for all layers with this input; None where the Hessian
        cannot be factorized.
    """
    factorization = factorize(hessian.float(), damping)
    return None if factorization is None else factorization.solve(crossed.float().T).T
