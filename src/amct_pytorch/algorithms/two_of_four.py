"""2:4 sparsity: which two of each four consecutive weights stay (L1SelectivePrune)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from amct_pytorch.graph.weight_layout import WeightLayout

KEPT, OUT_OF = 2, 4


def two_of_four_mask(weight: Tensor, layout: WeightLayout) -> Tensor:
    """True for the weights that stay: of each four along the input channels, the two largest.

    The input channels of each group of a convolution are parted into fours of their own,
    padded with zeros to a multiple of four. Of equal weights the first ones stay. The pattern
    is that of Mishra et al., arXiv 2104.08378, section 3.

    Args:
        weight: [out, in / groups, *kernel] or, of a transposed convolution,
            [in, out / groups, *kernel].
        layout: which axis counts what.

    Returns:
        bool, of the weight's shape.
    """
    sizes = weight.abs()
    axis = layout.in_axis
    stacked = layout.stacked > 1
    if stacked:  # the groups' input channels stand one after the other along axis 0
        sizes = sizes.unflatten(0, (layout.stacked, -1))
        axis = 1
    channels = sizes.shape[axis]
    missing = -channels % OUT_OF
    if missing:
        after = [0, 0] * (sizes.dim() - axis - 1)
        sizes = F.pad(sizes, [*after, 0, missing])
    fours = sizes.unflatten(axis, (-1, OUT_OF)).unbind(axis + 1)
    # Comparing each with each takes half the time of topk, and ties are told apart.
    beaten = [torch.zeros_like(fours[0], dtype=torch.uint8) for _ in fours]
    for first in range(OUT_OF):
        for second in range(first + 1, OUT_OF):
            larger = fours[second] > fours[first]
            beaten[first] += larger
            beaten[second] += ~larger
    mask = torch.stack([count < KEPT for count in beaten], axis + 1).flatten(axis, axis + 1)
    mask = mask.narrow(axis, 0, channels)
    return mask.reshape(weight.shape).contiguous()


def why_dense(shape: tuple[int, ...], layout: WeightLayout) -> str | None:
    """Why 2:4 takes nothing from a weight of this shape; None if it takes something."""
    channels = shape[layout.in_axis] // (layout.stacked if layout.in_axis == 0 else 1)
    if channels > KEPT:
        return None
    number = "one input channel" if channels == 1 else f"{channels} input channels"
    return f"it has {number} in a group, and of each four weights along them two stay"
