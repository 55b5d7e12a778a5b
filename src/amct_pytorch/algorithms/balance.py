"""DMQ: difficulty is moved between inputs and weights, one factor for each input channel.

The factors are those of SmoothQuant (see `smoothquant`), for convolutions too: inputs are divided
by them and weights multiplied, which changes nothing in exact arithmetic.
"""

from __future__ import annotations

from torch import Tensor

from amct_pytorch.graph.weight_layout import WeightLayout


def input_channel_maxima(layout: WeightLayout, groups: int, weight: Tensor) -> Tensor:
    """max |w| over the weights that each input channel meets, float32 [in_channels].

    Args:
        layout: of the weight.
        groups: of the convolution; 1 for other layers.
        weight: [Cout, Cin / groups, ...], or [Cin, Cout / groups, ...] where transposed.
    """
    magnitude = weight.detach().float().abs()
    if layout.in_axis == 0:
        return magnitude.flatten(1).amax(1)
    # An input channel of one group meets the output channels of that group.
    by_group = magnitude.flatten(2) if weight.dim() > 2 else magnitude[:, :, None]
    found: Tensor = by_group.unflatten(0, (groups, -1)).amax((1, 3)).flatten()
    return found


def balanced_weight(layout: WeightLayout, groups: int, weight: Tensor, factors: Tensor) -> Tensor:
    """The weight times the factor of the input channel that each of its values meets.

    Args:
        layout: as above.
        groups: as above.
        weight: as above; not changed.
        factors: [in_channels].

    Returns:
        In the type and shape of `weight`.
    """
    factors = factors.to(weight.device, weight.dtype if weight.dtype.is_floating_point else None)
    rest = [1] * (weight.dim() - 2)
    if layout.in_axis == 0:
        return weight.detach() * factors.view(-1, 1, *rest)
    by_group = weight.detach().unflatten(0, (groups, -1))
    balanced: Tensor = (by_group * factors.view(groups, 1, -1, *rest)).flatten(0, 1)
    return balanced
