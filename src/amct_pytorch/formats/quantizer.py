"""Tensors to codes and back, with scales of any granularity.

q = encode(x / s + o) and x ~ (decode(q) - o) * s; integers are rounded before the offset is
added. All arithmetic is in float32 whatever the dtype of the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats.base import NumberFormat, to_float32
from amct_pytorch.formats.granularity import Granularity
from amct_pytorch.formats.integer import IntFormat
from amct_pytorch.formats.microscaling import MicroscalingFormat


@dataclass(frozen=True)
class QuantParams:
    """Scale and offset of each granule of a tensor.

    Attributes:
        scale: float32, positive, of the granularity's `scales_shape`. Powers of two for mx
            formats, whose one-byte form is in `e8m0`.
        offset: int32 of the same shape; None for symmetric quantization.
    """

    scale: Tensor
    offset: Tensor | None = None


def scale_from_range(
    lo: Tensor, hi: Tensor, fmt: NumberFormat, *, symmetric: bool = True
) -> QuantParams:
    """The factors that spread `fmt` over [lo, hi], as its `factors` says.

    Args:
        lo: lower ends, of the scales' shape, any floating dtype.
        hi: upper ends, same shape.
        fmt: the number format.
        symmetric: without an offset. Only integers may have one.

    Raises:
        ArgumentValueError: if not `symmetric` for a format without an offset.
    """
    scale, offset = fmt.factors(to_float32(lo), to_float32(hi), symmetric=symmetric)
    return QuantParams(scale, None if symmetric else offset)


def params_of(
    x: Tensor, fmt: NumberFormat, granularity: Granularity, *, symmetric: bool = True
) -> QuantParams:
    """The factors of a tensor by its extremes; for mx formats by the block's error.

    Args:
        x: floating, at least one dimension. A granule with NaN or infinity has no usable scale:
            NaN or infinity, so that it is seen in all that comes after.
        fmt: the number format.
        granularity: which elements share a scale.
        symmetric: without an offset. Only integers may have one.

    Raises:
        ArgumentValueError: if not `symmetric` for a format without an offset.
    """
    if isinstance(fmt, MicroscalingFormat) and symmetric:
        scale = fmt.best_scale(granularity.rows(to_float32(x)))
        return QuantParams(scale.reshape(granularity.scales_shape(x.shape)))
    lo, hi = granularity.reduce(x, torch.amin), granularity.reduce(x, torch.amax)
    return scale_from_range(lo, hi, fmt, symmetric=symmetric)


def quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, fmt: NumberFormat, granularity: Granularity
) -> Tensor:
    """The codes of `x`: encode(x / scale), plus the offset for integers.

    Args:
        x: floating, at least one dimension.
        scale: of ``granularity.scales_shape(x.shape)``.
        offset: of the same shape, or None.
        fmt: the number format.
        granularity: which elements share a scale.

    Returns:
        One unpacked code an element (`fmt.code_dtype`, shape of `x`).

    Raises:
        ArgumentValueError: for a scale of another shape, or an offset for a float format.
    """
    steps, _, _ = _steps(x, scale, offset, fmt, granularity)
    return granularity.from_rows(fmt.encode(steps), x.shape)


def dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, fmt: NumberFormat, granularity: Granularity
) -> Tensor:
    """The numbers (float32, shape of `codes`) that codes stand for; see `quantize`."""
    values = granularity.rows(fmt.decode(codes))
    scales, offsets = _rows_of_factors(codes, values, scale, offset, fmt, granularity)
    if offsets is not None:
        values = values - offsets
    return granularity.from_rows(values * scales, codes.shape)


def fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, fmt: NumberFormat, granularity: Granularity
) -> Tensor:
    """`x` after `quantize` and `dequantize`, in its own dtype, without making codes."""
    steps, scales, offsets = _steps(x, scale, offset, fmt, granularity)
    values = fmt.round(steps)
    if offsets is not None:
        values.sub_(offsets)
    return granularity.from_rows(values.mul_(scales), x.shape).to(x.dtype)


def _steps(
    x: Tensor, scale: Tensor, offset: Tensor | None, fmt: NumberFormat, granularity: Granularity
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x` in units of its scales, by rows, and the factors in that shape."""
    rows = granularity.rows(x)
    scales, offsets = _rows_of_factors(x, rows, scale, offset, fmt, granularity)
    steps = rows / scales
    if offsets is not None:
        steps = steps.round_().add_(offsets)
    return steps, scales, offsets


def _rows_of_factors(
    x: Tensor,
    rows: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    fmt: NumberFormat,
    granularity: Granularity,
) -> tuple[Tensor, Tensor | None]:
    expected = granularity.scales_shape(x.shape)
    factors = {"scale": scale} if offset is None else {"scale": scale, "offset": offset}
    for name, factor in factors.items():
        if tuple(factor.shape) != expected:
            raise ArgumentValueError(
                f"{name} has shape {tuple(factor.shape)}; a tensor of shape {tuple(x.shape)} by "
                f"{granularity.kind} needs {expected}"
            )
    if offset is not None and not isinstance(fmt, IntFormat):
        raise ArgumentValueError(f"an offset was given; {fmt.name} has none")
    row_shape = (*rows.shape[:-1], 1)
    return scale.float().reshape(row_shape), None if offset is None else offset.reshape(row_shape)
