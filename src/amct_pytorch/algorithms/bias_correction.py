"""Taking each layer's mean output error out of its bias, layer by layer in order.

Rounding weights and inputs shifts the mean of a layer's output. The shift is measured on
calibration data with everything before the layer already quantized and corrected, and is
subtracted in the bias (Nagel et al., Data-Free Quantization Through Weight Equalization and
Bias Correction, arXiv 1906.04721, section 4.2, in its empirical form). Over several batches
the correction is the mean of what each batch asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BiasCorrection:
    """The running correction of one layer's bias.

    Args:
        bias: the layer's bias before correction, [channels].
        largest: largest |bias| that the deployed integer bias can hold, [1] or [channels].
    """

    def __init__(self, bias: Tensor, largest: Tensor) -> None:
        self._start = bias.detach().double()
        self._largest = largest.double()
        self.bias = self._start
        self._batches = 0

    @property
    def change(self) -> Tensor:
        """Corrected minus original bias, float64 [channels]."""
        return self.bias - self._start

    def update(self, float_means: Tensor, quantized_means: Tensor) -> Tensor:
        """Takes one more batch into account.

        Args:
            float_means: mean float output of each channel on the batch.
            quantized_means: the same of the quantized layer with the present `bias`.

        Returns:
            By how much this batch moved the bias, float64 [channels].
        """
        self._batches += 1
        before = self.bias
        moved = before + (float_means - quantized_means) / self._batches
        self.bias = torch.clamp(moved, -self._largest, self._largest)
        return self.bias - before

    def undo(self) -> None:
        """Goes back to the original bias."""
        self.bias = self._start
