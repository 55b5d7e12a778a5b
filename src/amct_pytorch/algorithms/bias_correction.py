"""Taking the mean error that rounded weights cause out of a layer's bias.

With W' the weights after quantization, a layer's output is off by conv(x, W' - W) on top of
what rounding the input adds; its mean over the data is a constant per output channel and
belongs into the bias (Nagel et al., Data-Free Quantization Through Weight Equalization and
Bias Correction, arXiv 1906.04721, section 4.2). The layer is linear, so the mean of its
output is its output on the mean input: no second pass over the data is needed, all batches
count, and the statistic is a sum that batches and processes add up.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from amct_pytorch.graph.tensors import in_float64
from amct_pytorch.observers.mean_input import MeanInput


def output_shift(
    mean_input: MeanInput, output: Callable[[Tensor], Tensor], channel_axis: int
) -> Tensor:
    """Mean over the data of what a linear layer with the given weights puts out.

    Args:
        mean_input: what was observed.
        output: the layer's call, without a bias, on a mean input.
        channel_axis: axis of its result that counts channels.

    Returns:
        float64 [channels], on the CPU.
    """
    total, positions = None, 0
    for mean, items in mean_input.means():
        y = in_float64(output(mean)).transpose(0, channel_axis).flatten(1)
        weighted = y.sum(1) * items
        total = weighted if total is None else total + weighted
        positions += items * y.shape[1]
    assert total is not None
    return total / positions
