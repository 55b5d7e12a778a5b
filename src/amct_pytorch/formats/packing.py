"""Two four-bit codes in a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.errors import ArgumentValueError


def pack_nibbles(codes: Tensor, axis: int = -1) -> Tensor:
    """The low four bits of neighbours along `axis` in one uint8, the even index in the low half.

    An odd size is filled up with a zero nibble.
    """
    last = codes.movedim(axis, -1)
    packed = last[..., 0::2].to(torch.uint8) & 0x0F
    high = last[..., 1::2].to(torch.uint8) << 4
    packed[..., : high.shape[-1]] |= high
    return packed.movedim(-1, axis).contiguous()


def unpack_nibbles(packed: Tensor, size: int, axis: int = -1) -> Tensor:
    """The `size` nibbles (uint8, 0 to 15) that `pack_nibbles` put along `axis`.

    Raises:
        ArgumentValueError: if `packed` does not hold that many.
    """
    if packed.shape[axis] != (size + 1) // 2:
        raise ArgumentValueError(
            f"size is {size}; the packed tensor of shape {tuple(packed.shape)} holds "
            f"{packed.shape[axis]} bytes along axis {axis}, two codes each"
        )
    last = packed.movedim(axis, -1)
    nibbles = torch.stack((last & 0x0F, last >> 4), dim=-1).flatten(-2)[..., :size]
    return nibbles.movedim(-1, axis).contiguous()
