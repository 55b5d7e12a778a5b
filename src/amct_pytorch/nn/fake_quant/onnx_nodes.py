"""What quantizers become in an ONNX file: QuantizeLinear and DequantizeLinear.

The integers are int8 whatever the number of bits: ONNX has 4-bit ones from opset 21 on only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.fake_quant.real_values import with_real_values


def quantize_dequantize(x: Tensor, scale: float, offset: int, number_format: IntFormat) -> Tensor:
    """A pair of nodes for one scale; below 8 bits, after a Clip to the range.

    Args:
        x: float32, as torch.export traces it.
        scale: factor.
        offset: factor.
        number_format: the integers, of 8 bits or fewer.
    """
    step, zero = with_real_values(
        lambda: (torch.tensor(scale), torch.tensor(offset, dtype=torch.int8))
    )
    symbolic = torch.onnx.ops.symbolic
    if number_format.bits < 8:
        ends = number_format.qmin - offset, number_format.qmax - offset
        low, high = with_real_values(lambda: [torch.tensor(end * scale) for end in ends])
        x = symbolic("Clip", (x, low, high), dtype=x.dtype, shape=x.shape)
    codes = symbolic("QuantizeLinear", (x, step, zero), dtype=torch.int8, shape=x.shape)
    return symbolic("DequantizeLinear", (codes, step, zero), dtype=x.dtype, shape=x.shape)


def dequantize(codes: Tensor, scale: Tensor, layout: WeightLayout) -> Tensor:
    """A weight that is stored as integers.

    Args:
        codes: int8, the weight's integers; a real tensor, as `scale`.
        scale: float32 [1] or [output channels].
        layout: which weights belong to which output channel.
    """
    shape, axis, groups = codes.shape, layout.out_axis, layout.stacked
    per_channel = scale.numel() > 1

    def stored() -> tuple[Tensor, Tensor, Tensor]:
        kept = codes
        if per_channel and groups > 1:
            # One axis counts the channels of one group only: the groups go side by side.
            parts = codes.reshape(groups, -1, *shape[1:]).transpose(0, 1)
            kept = parts.reshape(-1, groups * shape[1], *shape[2:])
        factors = scale.float() if per_channel else scale.float().reshape(())
        return kept.contiguous(), factors, torch.zeros_like(factors, dtype=torch.int8)

    kept, factors, zeros = with_real_values(stored)
    symbolic = torch.onnx.ops.symbolic
    weight = symbolic(
        "DequantizeLinear",
        (kept, factors, zeros),
        {"axis": axis} if per_channel else {},
        dtype=torch.float32,
        shape=kept.shape,
    )
    if kept.shape == shape:
        return weight
    apart = [kept.shape[0], groups, *shape[1:]]
    swapped = [groups, kept.shape[0], *shape[1:]]
    order = [1, 0, *range(2, len(apart))]
    sizes = with_real_values(lambda: [torch.tensor(apart), torch.tensor(list(shape))])
    parts = symbolic("Reshape", (weight, sizes[0]), dtype=torch.float32, shape=apart)
    moved = symbolic("Transpose", (parts,), {"perm": order}, dtype=torch.float32, shape=swapped)
    return symbolic("Reshape", (moved, sizes[1]), dtype=torch.float32, shape=shape)
