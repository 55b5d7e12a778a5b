"""AWQ: input channels that carry large activations get finer weights.

Source: Lin et al., AWQ (arXiv 2306.00978), section 3.2. W x = (W diag(s)) (diag(s)^-1 x): a channel
multiplied by s > 1 before rounding has its rounding error divided by s afterwards, at the price
of a wider range for all that share its scale. s = (mean|x|)^a, a on a grid, by the error of the
output. Then ranges of granules are narrowed where the output error falls (`clip_search`).

Output errors are not measured on samples: for a linear layer they follow exactly from the
second moments H = E[x xᵀ] of all calibration tokens, as tr(E H Eᵀ) with E the weights' error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amct_pytorch.algorithms.clip_search import clip_search
from amct_pytorch.algorithms.finite import is_finite
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import QuantParams
from amct_pytorch.formats.quantizer import fake_quantize, params_of


@dataclass(frozen=True)
class AwqSettings:
    """What is searched.

    Attributes:
        grids_num: how many exponents are tried, 0, 1/n … (n - 1)/n; at least 1.
        clip: whether ranges are narrowed afterwards.

    Raises:
        ArgumentValueError: on construction, for a value that is not allowed above.
    """

    grids_num: int = 20
    clip: bool = True

    def __post_init__(self) -> None:
        if self.grids_num < 1:
            raise ArgumentValueError(f"grids_num is {self.grids_num}; allowed are 1 and above")


@dataclass(frozen=True)
class AwqLayer:
    """One quantized layer; losses are mean squared output errors of a token, summed over outputs.

    Attributes:
        weight: W diag(s) as quantized, float32 [N, K]; the layer's input is divided by s.
        params: scale and offset of its granules.
        loss_nearest: of rounding W to the nearest without any search.
        loss: of what is returned.
    """

    weight: Tensor
    params: QuantParams
    loss_nearest: float
    loss: float


@dataclass(frozen=True)
class AwqResult:
    """Layers that share an input.

    Attributes:
        input_scale: s, float32 [K], positive; all ones where no exponent helps.
        alpha: the exponent chosen.
        layers: one entry a layer, in the order given. No loss is above that of rounding to the
            nearest.
    """

    input_scale: Tensor
    alpha: float
    layers: tuple[AwqLayer, ...]


def solve_awq(
    weights: Sequence[Tensor],
    second_moments: Tensor,
    mean_abs: Tensor,
    grid: WeightGrid,
    settings: AwqSettings = AwqSettings(),
) -> AwqResult:
    """Chooses the input scale of layers that share an input, and quantizes them with it.

    Args:
        weights: floating [N_i, K] each, on one device.
        second_moments: float32 [K, K], mean of x xᵀ over tokens.
        mean_abs: float32 [K], mean of |x| over tokens.
        grid: the numbers that weights may take.
        settings: what is searched.

    Raises:
        ArgumentValueError: for shapes that do not fit, or values that are not finite.
    """
    grids = [grid] * len(weights)
    chosen = choose_input_scale(weights, second_moments, mean_abs, grids, settings)
    layers = [
        quantize_scaled(weight, second_moments, chosen.scale, grid, settings) for weight in weights
    ]
    return AwqResult(
        chosen.scale,
        chosen.alpha,
        tuple(
            replace(layer, loss_nearest=loss)
            for layer, loss in zip(layers, chosen.losses_nearest, strict=True)
        ),
    )


@dataclass(frozen=True)
class InputScale:
    """What was chosen for layers that share an input.

    Attributes:
        scale: s, float32 [K], positive; all ones where no exponent helps.
        alpha: its exponent.
        losses_nearest: of rounding to the nearest without a scale, one a layer.
    """

    scale: Tensor
    alpha: float
    losses_nearest: tuple[float, ...]


def choose_input_scale(
    weights: Sequence[Tensor],
    second_moments: Tensor,
    mean_abs: Tensor,
    grids: Sequence[WeightGrid],
    settings: AwqSettings = AwqSettings(),
) -> InputScale:
    """The exponent with the least output error of all layers together, with none above nearest.

    What layers share must make none of them worse than rounding to the nearest. Where it would,
    after ranges have been narrowed, the next best exponent is taken.

    Args:
        weights: as in `solve_awq`.
        second_moments: as in `solve_awq`.
        mean_abs: as in `solve_awq`. Channels with equal entries get equal scales.
        grids: the numbers that each weight may take.
        settings: what is searched.

    Raises:
        ArgumentValueError: as `solve_awq`.
    """
    _check(weights, second_moments, mean_abs)
    floats = [weight.float() for weight in weights]
    exponents = [step / settings.grids_num for step in range(settings.grids_num)]
    losses = []
    for alpha in exponents:
        scale = awq_scale(mean_abs, alpha)
        losses.append(
            [
                output_loss(_rounded(weight * scale, grid)[0] / scale - weight, second_moments)
                for weight, grid in zip(floats, grids, strict=True)
            ]
        )
    nearest = losses[0]

    def none_worse(step: int) -> bool:
        scale = awq_scale(mean_abs, exponents[step])
        for weight, grid, loss, plain in zip(floats, grids, losses[step], nearest, strict=True):
            if loss > plain and (
                not settings.clip
                or quantize_scaled(weight, second_moments, scale, grid, settings).loss > plain
            ):
                return False
        return True

    # The first one is rounding to the nearest itself.
    ranked = sorted(range(len(exponents)), key=lambda step: sum(losses[step]))
    best = next((step for step in ranked if none_worse(step)), 0)
    return InputScale(awq_scale(mean_abs, exponents[best]), exponents[best], tuple(nearest))


def quantize_scaled(
    weight: Tensor,
    second_moments: Tensor,
    scale: Tensor,
    grid: WeightGrid,
    settings: AwqSettings = AwqSettings(),
) -> AwqLayer:
    """Quantizes W diag(s), by ranges that are searched if the settings say so.

    Args:
        weight: floating [N, K].
        second_moments: of the input before it is divided, float32 [K, K].
        scale: s, float32 [K].
        grid: the numbers that the weight may take.
        settings: what is searched.

    Returns:
        The layer; its `loss_nearest` is that without narrowed ranges.
    """
    moments = second_moments / scale / scale[:, None]
    scaled = weight.float() * scale
    quantized, params = _rounded(scaled, grid)
    plain = loss = output_loss(quantized - scaled, moments)
    if settings.clip:
        params = clip_search(scaled, params, moments, grid)
        quantized = _fake(scaled, params, grid)
        loss = output_loss(quantized - scaled, moments)
    return AwqLayer(quantized, params, plain, loss)


def awq_scale(mean_abs: Tensor, alpha: float) -> Tensor:
    """mean_abs^alpha, divided by the geometric mean of its extremes; 1 for channels without input.

    The division keeps the range of the scaled weights where it was.
    """
    alive = mean_abs > 0
    if alpha == 0 or not bool(alive.any()):
        return torch.ones_like(mean_abs)
    logs = mean_abs.where(alive, 1.0).log() * alpha
    low = logs.where(alive, torch.inf).amin()
    high = logs.where(alive, -torch.inf).amax()
    return (logs - (low + high) / 2).exp().where(alive, 1.0)


def output_loss(error: Tensor, second_moments: Tensor) -> float:
    """tr(E H Eᵀ): the mean squared output error of a token that a weight error [N, K] causes."""
    return float(((error @ second_moments) * error).sum(dtype=torch.float64))


def _rounded(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, QuantParams]:
    params = params_of(weight, grid.fmt, grid.granularity, symmetric=grid.symmetric)
    return _fake(weight, params, grid), params


def _fake(weight: Tensor, params: QuantParams, grid: WeightGrid) -> Tensor:
    return fake_quantize(weight, params.scale, params.offset, grid.fmt, grid.granularity)


def _check(weights: Sequence[Tensor], second_moments: Tensor, mean_abs: Tensor) -> None:
    if not weights:
        raise ArgumentValueError("weights is empty; give at least one")
    features = mean_abs.numel()
    if mean_abs.dim() != 1 or second_moments.shape != (features, features):
        raise ArgumentValueError(
            f"second_moments has shape {tuple(second_moments.shape)} and mean_abs "
            f"{tuple(mean_abs.shape)}; allowed are [K, K] and [K]"
        )
    for index, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != features or not weight.numel():
            raise ArgumentValueError(
                f"weights[{index}] has shape {tuple(weight.shape)}; allowed is [N, {features}]"
            )
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    for name, value in {**named, "second_moments": second_moments, "mean_abs": mean_abs}.items():
        if not is_finite(value):
            raise ArgumentValueError(f"{name} holds NaN or infinity")
