"""Weights that make up for what the quantized layers before have done to the input."""

from __future__ import annotations

from torch import Tensor

from amct_pytorch.algorithms.error_feedback import factorize


def corrected_target(
    weight: Tensor, hessian: Tensor, crossed: Tensor, damping: float = 0.3
) -> Tensor:
    """The weight whose output on quantized inputs is nearest to the float layer's on float ones.

    Asymmetric calibration (GPTAQ, arXiv 2504.02692, section 3) asks for min ‖W X - V X̂‖². Its
    solution before rounding is V = W + W (X - X̂) X̂ᵀ (X̂ X̂ᵀ)⁻¹, and rounding V under X̂ X̂ᵀ is
    the rest of the problem. Damping keeps V near W: the correction is fitted to the calibration
    data, and without damping it fits their noise as well.

    Args:
        weight: floating [N, K].
        hessian: mean of x̂ x̂ᵀ over tokens, [K, K], x̂ the input behind quantized layers.
        crossed: mean of (x - x̂) x̂ᵀ over the same tokens, [K, K], x the input in the float
            model.
        damping: as a fraction of the mean of the Hessian's diagonal.

    Returns:
        float32 [N, K]; W where the Hessian cannot be factorized.
    """
    weight = weight.detach().float()
    factorization = factorize(hessian.float(), damping)
    if factorization is None:
        return weight
    return weight + factorization.solve((weight @ crossed.float()).T).T
