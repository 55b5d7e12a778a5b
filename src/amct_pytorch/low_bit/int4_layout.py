"""The order in which torch's int4 kernel for CPUs wants its codes.

That order depends on the processor's instructions and is not documented, so the way back is
learned: the kernel's own packing is applied to the digits of every element's index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.formats.packing import unpack_nibbles


def to_kernel(codes: Tensor) -> Tensor:
    """Codes (int8 [N, K], -8 to 7) in the kernel's order, uint8 [N, K / 2].

    N must be a multiple of 16 and K of 2.
    """
    return _packed((codes + 8).to(torch.int32))


def from_kernel(packed: Tensor, columns: int) -> Tensor:
    """The codes (int8 [N, K]) that `to_kernel` ordered."""
    shape = (len(packed), columns)
    count = len(packed) * columns
    index = torch.arange(count, dtype=torch.int32).view(shape)
    source = torch.zeros(count, dtype=torch.int64)
    for digit in range(0, count.bit_length(), 4):
        source += _nibbles(_packed((index >> digit) & 15)).long() << digit
    codes = torch.empty(count, dtype=torch.int8)
    codes[source] = _nibbles(packed).to(torch.int8) - 8
    return codes.view(shape)


def _packed(codes: Tensor) -> Tensor:
    # The second argument, a tile size, is for GPUs only.
    return torch._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)


def _nibbles(packed: Tensor) -> Tensor:
    return unpack_nibbles(packed.flatten(), packed.numel() * 2)
