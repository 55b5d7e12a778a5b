"""The quantization factors of one layer, as every room passes them around."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FORCE_FP16 = "FORCE_FP16_QUANT"


@dataclass(frozen=True)
class LayerFactors:
    """Scales and offsets of one layer, in the units of the record file.

    Attributes:
        scale_w: weight scales, one or one per output channel; empty until known.
        scale_d: scale of the layer's input; None while (or where) there is none.
        offset_d: zero point of the layer's input, in [-2^(b-1), 2^(b-1) - 1].
        weight_bits: bits of the weights.
        activation_bits: bits of the input.
        balance: DMQ balance factors, one per input channel, or empty.
        skip_fusion: whether Conv+BN fusion was switched off for the layer.
        fakequant_precision_mode: ``DEFAULT`` or ``FORCE_FP16_QUANT``.
    """

    scale_w: tuple[float, ...] = ()
    scale_d: float | None = None
    offset_d: int = 0
    weight_bits: int = 8
    activation_bits: int = 8
    balance: tuple[float, ...] = ()
    skip_fusion: bool = False
    fakequant_precision_mode: str = "DEFAULT"

    @property
    def complete(self) -> bool:
        """Whether the layer can be deployed: weight and input factors are known."""
        return bool(self.scale_w) and self.scale_d is not None

    def bias_scale(self) -> np.ndarray:
        """scale_w * scale_d, the unit of the integer bias: float32 [1] or [out_channels]."""
        with np.errstate(over="ignore", under="ignore"):
            scale = np.asarray(self.scale_w, np.float32) * np.float32(self.scale_d)
            return np.asarray(scale, np.float32)

    def dequant_scale(self) -> np.ndarray:
        """What integer sums are multiplied by: `bias_scale`, or under FORCE_FP16_QUANT its
        float32 bits with the low 13 cleared."""
        scale = self.bias_scale()
        if self.fakequant_precision_mode != FORCE_FP16:
            return scale
        cleared: np.ndarray = scale.view(np.uint32) & np.uint32(0xFFFFE000)
        return cleared.view(np.float32)
