"""Which tokens of the batch that is running count in calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_MASK: ContextVar[Tensor | None] = ContextVar("padding_mask", default=None)


@contextmanager
def padding_mask(mask: Tensor | None) -> Iterator[None]:
    """Leaves padding out of what is observed of the forward passes inside.

    Args:
        mask: [batch, sequence], nonzero for tokens that count, such as a tokenizer's attention
            mask; None counts all.
    """
    token = _MASK.set(mask)
    try:
        yield
    finally:
        _MASK.reset(token)


def mask_for(x: Tensor) -> Tensor | None:
    """The mask in force, if it is one for inputs of this shape: bool, one entry a token.

    Inputs [batch, sequence, K] and [batch·sequence, K] have one; others, such as the tokens
    routed to one expert, have none.
    """
    mask = _MASK.get()
    if mask is None:
        return None
    counts = mask != 0
    tokens = x.shape[:-1]
    if tokens == counts.shape:
        return counts
    if tokens == torch.Size([counts.numel()]):
        return counts.flatten()
    return None


def unpadded(x: Tensor) -> Tensor:
    """The tokens of inputs [..., K] that count, [tokens, K]."""
    mask = mask_for(x)
    rows = x.reshape(-1, x.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1)]
