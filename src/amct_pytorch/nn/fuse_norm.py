"""BatchNorm folded into the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_pytorch.graph.tensors import in_float64
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.wrapped import Wrapped, file_dtype


class SkippedNorm(Wrapped):
    """A BatchNorm that was fused into the layer before it: passes its operand on.

    Only the batch_norm call is left out; whatever else a subclass does in its forward (an
    activation, say) still runs.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm, ("batch_norm",))

    def answer(self, call: LayerCall) -> Tensor:
        """The data operand as it is."""
        return call.x


def fuse_norm(
    weight: Tensor, bias: Tensor | None, norm: _BatchNorm, layout: WeightLayout
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the BatchNorm behind it folded in.

    w' = w * g / sqrt(v + eps) per output channel, b' = (b - m) * g / sqrt(v + eps) + beta,
    computed in float64 and returned in `file_dtype` of the weight, on its device.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = in_float64(norm.running_mean), in_float64(norm.running_var)
    gamma = torch.ones_like(mean) if norm.weight is None else in_float64(norm.weight)
    beta = torch.zeros_like(mean) if norm.bias is None else in_float64(norm.bias)
    factor = gamma / torch.sqrt(variance + norm.eps)
    shift = -mean if bias is None else in_float64(bias) - mean
    dtype = file_dtype(weight.dtype)
    fused = (in_float64(weight) * layout.along_channels(factor, weight.shape)).to(dtype)
    return fused.to(weight.device), (shift * factor + beta).to(dtype).to(weight.device)
