"""E8M0, the one-byte scale of microscaling formats (OCP MX v1.0, section 5.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

BIAS = 127
NAN_CODE = 255


def encode_scale(scale: Tensor) -> Tensor:
    """The exponents of powers of two as bytes: uint8, code c stands for 2^(c - 127).

    Args:
        scale: float32, each 2^-127 to 2^127 or not finite. Others are rounded down to a power
            of two; what is not finite or not positive becomes the code of NaN, 255.
    """
    _, exponent = torch.frexp(scale)  # scale = m * 2^exponent with m in [0.5, 1)
    codes = (exponent - 1 + BIAS).clamp(0, NAN_CODE - 1)
    return codes.where(scale.isfinite() & (scale > 0), NAN_CODE).to(torch.uint8)


def decode_scale(codes: Tensor) -> Tensor:
    """The scales (float32) that E8M0 codes (uint8) stand for; 255 is NaN."""
    bits = codes.to(torch.int32) << 23  # the exponent field of float32 has the same bias
    bits = bits.where(codes != 0, 1 << 22)  # 2^-127 is subnormal in float32
    return bits.where(codes != NAN_CODE, 0x7FC00000).view(torch.float32)
