"""How much a layer suffers from quantization: measures of its output's change."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from amct_pytorch.observers.statistics import Agreement


class SensitivityBase(ABC):
    """Compares a layer's outputs; subclasses may be given to the search as instances."""

    @abstractmethod
    def compare(self, data: Tensor, other: Tensor) -> float:
        """A score of how alike two outputs are; the lower, the more sensitive the layer.

        Args:
            data: the float layer's output.
            other: the quantized layer's output on the same input, of the same shape.
        """


class CosineSimilaritySensitivity(SensitivityBase):
    """0.5 + 0.5 · cos(data, other), in [0, 1]; 0 where there is nothing finite to compare."""

    def compare(self, data: Tensor, other: Tensor) -> float:
        """See `SensitivityBase.compare`."""
        agreement = Agreement.between(data, other)
        if agreement.sqnr_db == -math.inf and agreement.cosine == 0.0:
            return 0.0 if bool((data != 0).any()) else 0.5
        return 0.5 + 0.5 * agreement.cosine
