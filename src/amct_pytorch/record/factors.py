"""The quantization factors of one layer, as every room passes them around."""

from __future__ import annotations

from dataclasses import dataclass


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
