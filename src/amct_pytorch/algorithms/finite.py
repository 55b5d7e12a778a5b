"""Whether a tensor holds NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in `x`."""
    if not x.numel():
        return True
    # NaN and infinity show in the extremes, at one pass and no copy.
    return bool(torch.stack(x.aminmax()).isfinite().all())
