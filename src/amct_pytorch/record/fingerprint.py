"""A short hash that ties an ONNX file to the factors it was calibrated with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from amct_pytorch.record.factors import LayerFactors


def fingerprint(factors: Mapping[str, LayerFactors]) -> str:
    """SHA-256 over layer names and the float32 bits of their factors, as hex.

    The same before a record is written and after it was read again.
    """
    digest = hashlib.sha256()
    for name, layer in factors.items():
        scales = np.array([*layer.scale_w, layer.scale_d or 0.0, *layer.balance], np.float32)
        bits = (layer.offset_d, layer.weight_bits, layer.activation_bits)
        digest.update(f"{name}\0{bits}\0".encode())
        digest.update(scales.tobytes())
    return digest.hexdigest()
