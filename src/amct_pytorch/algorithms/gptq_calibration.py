"""What GPTQ gathers of one layer while batches run through the model.

Layers that are called with the very same tensor (query, key and value; gate and up) share what
is gathered: one Hessian, one factorization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.algorithms.gptq import (
    GptqResult,
    GptqSettings,
    PreparedHessian,
    prepare,
    solve_prepared,
)
from amct_pytorch.algorithms.hessian import CHUNK, Hessian
from amct_pytorch.algorithms.padding import mask_for
from amct_pytorch.algorithms.sharing import InputStatistics, note_counted, statistics_for
from amct_pytorch.algorithms.target_correction import correction
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.errors import CalibrationError


class SharedInput(InputStatistics):
    """The statistics of one input tensor and what has been computed from them.

    Attributes:
        owner: the calibration that counts new batches.
        hessian: second moments of the input.
        crossed: Σ (x - x̂) x̂ᵀ over the tokens with a reference, float32 [K, K]; None before
            the first.
        reference_tokens: how many tokens that are.
    """

    def __init__(self, owner: GptqCalibration, x: Tensor) -> None:
        super().__init__(owner)
        self.hessian = Hessian(x.shape[-1], x.device)
        self.crossed: Tensor | None = None
        self.reference_tokens = 0
        # Computed for the first layer that asks, and outdated by another batch. The moments are
        # then in `_mean` alone; what is prepared changes their diagonal, so that is kept.
        self._mean: tuple[Tensor, Tensor, int] | None = None
        self._prepared: tuple[GptqSettings, int, PreparedHessian] | None = None
        self._correction: tuple[Tensor | None] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens have been counted."""
        return self.hessian.tokens if self._mean is None else self._mean[2]

    def add(self, x: Tensor, reference: Tensor | None) -> None:
        """Counts one batch; `reference` is the same input in the float model."""
        mask = mask_for(x)
        if self._mean is not None:
            self.hessian.put_back(self.mean(), self._mean[2])
        self.hessian.add(x, mask)
        self._mean = self._prepared = self._correction = None
        if reference is None:
            return
        seen = x.detach().reshape(-1, x.shape[-1])
        meant = reference.detach().reshape(-1, x.shape[-1])
        if mask is not None:
            counts = mask.reshape(-1)
            seen, meant = seen[counts], meant[counts]
        if self.crossed is None:
            self.crossed = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        for quantized, plain in zip(seen.split(CHUNK), meant.split(CHUNK), strict=True):
            rows = quantized.float()
            self.crossed.addmm_((plain.float() - rows).T, rows)
        self.reference_tokens += len(seen)

    def mean(self) -> Tensor:
        """The second moments, float32 [K, K]: the only copy of them."""
        if self._mean is None:
            tokens, mean = self.hessian.tokens, self.hessian.take_mean()
            self._mean = mean, mean.diagonal().clone(), tokens
        mean, diagonal, _ = self._mean
        mean.diagonal().copy_(diagonal)
        return mean

    def prepared(self, settings: GptqSettings, grid: WeightGrid) -> PreparedHessian:
        """The factorized Hessian, computed for the first layer that asks."""
        size = grid.group_size(self.hessian.features)
        known = self._prepared
        if known is None or known[:2] != (settings, size):
            known = self._prepared = None  # let go before there are two of them
            prepared = prepare(self.mean(), grid, settings, self.tokens)
            self._prepared = known = settings, size, prepared
        return known[2]

    def target(self, weight: Tensor) -> Tensor | None:
        """What to bring a weight near to; None: the weight itself."""
        if self.crossed is None:
            return None
        if self._correction is None:
            self._prepared = None  # made of the same matrix
            found = correction(self.mean(), self.crossed)
            if found is not None:
                found /= max(self.reference_tokens, 1)
            self._correction = (found,)
        (found,) = self._correction
        return None if found is None else torch.addmm(weight.float(), weight.float(), found)


class GptqCalibration:
    """Gathers the inputs of one linear layer and solves it.

    Args:
        name: the layer's, for messages.
        settings: how to solve.
    """

    def __init__(self, name: str, settings: GptqSettings) -> None:
        self.name = name
        self.settings = settings
        self.shared: SharedInput | None = None
        self._batches = 0

    def observe(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Counts one batch of the layer's input; tokens under a `padding_mask` do not count.

        A tensor that a layer before has counted in shared statistics is not counted again. A
        layer that shares its statistics and is then given another tensor goes on alone from a
        copy of them.

        Args:
            x: floating [..., K].
            reference: the input in the float model for the same tokens, where `x` comes from
                quantized layers; its difference is made up for.

        Raises:
            ArgumentValueError: for a token that counts and is not finite.
        """
        self.shared, known = statistics_for(
            x, self._batches, self, self.shared, lambda: SharedInput(self, x)
        )
        if not known:
            self.shared.add(x, reference)
            note_counted(x, self._batches, self.shared)
        self._batches += 1

    def solve(self, weight: Tensor, grid: WeightGrid) -> GptqResult:
        """The quantized weight; what was gathered is let go.

        Args:
            weight: floating [N, K].
            grid: the numbers that are allowed.

        Raises:
            CalibrationError: if no token has been counted.
        """
        shared, self.shared = self.shared, None
        if shared is None or not shared.tokens:
            raise CalibrationError(
                f"{self.name}: no input token was seen in calibration; run batches that reach it"
            )
        target = shared.target(weight)
        prepared = shared.prepared(self.settings, grid)
        return solve_prepared(weight, prepared, grid, self.settings, target=target)
