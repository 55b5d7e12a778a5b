"""Fast paths of `LowBitLinear`: products that torch has kernels for."""

from __future__ import annotations

import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amct_pytorch.formats import IntFormat
from amct_pytorch.low_bit import int4_layout
from amct_pytorch.low_bit.reference import (
    buffers,
    divided,
    exact_linear,
    reference_linear,
    scaled_sums,
    with_bias,
)

if TYPE_CHECKING:
    from amct_pytorch.low_bit.deploy_linear import LowBitLinear

# Beyond this many tokens at once, dequantizing int8 weights for one float product is faster.
FEW_TOKENS = 32
LARGEST_INT32 = 2**31 - 1
# Of an 8-bit code less its offset, and a symmetric one; an int32 holds the bias and all of them.
LARGEST_PRODUCT = 255 * 128
# Of the square matrices that are multiplied to see what is fast: about 1 ms each.
TIMED_SIZE = 256
# Of the operands of torch's weight-only kernels: they load whole vectors and end the process where
# those are not aligned. What torch allocates is.
ALIGNMENT = 64
# Relative to the sums of |x · w|: inputs, sums and, in groups, scales are rounded to bfloat16,
# at most 2^-9 of them each.
BFLOAT16_TOLERANCE = 3 * 2.0**-9


class Kernel(ABC):
    """One way to run a `LowBitLinear`. Without state: what it needs is on the layer.

    Attributes:
        name: for `LowBitLinear.kernel`.
        tolerance: largest difference to the reference, relative to the sum of magnitudes
            sum |x| |w| of an output. 0: none.
    """

    name: str
    tolerance: float = 0.0

    @abstractmethod
    def fits(self, layer: LowBitLinear, x: Tensor) -> bool:
        """Whether it can run the layer on inputs of the device and dtype of `x`."""

    def prepare(self, layer: LowBitLinear) -> None:
        """Brings `packed` into the kernel's order and sets `kernel_factors`, if need be."""
        layer.kernel_factors = None

    def canonical(self, layer: LowBitLinear) -> Tensor:
        """`packed` in the order that is stored."""
        return layer.packed

    @abstractmethod
    def run(self, layer: LowBitLinear, x: Tensor) -> Tensor:
        """The output for x [..., K], of its dtype."""


class Int8WeightCpu(Kernel):
    """``torch._weight_int8pack_mm``: int8 weights by tensor or channel, bfloat16 inputs.

    Scales are applied to its sums in float32, so only inputs and sums are rounded to bfloat16.
    More than FEW_TOKENS tokens at once go through the reference.
    """

    name = "int8 weights, bfloat16 inputs"
    tolerance = BFLOAT16_TOLERANCE

    def fits(self, layer: LowBitLinear, x: Tensor) -> bool:
        """CPU; K a multiple of 16."""
        weight = layer.spec.weight
        return (
            layer.spec.inputs is None
            and weight.type == "int8"
            and weight.strategy != "group"
            and x.device.type == "cpu"
            and layer.in_features % 16 == 0
        )

    def prepare(self, layer: LowBitLinear) -> None:
        """Moves codes that lie where the kernel would crash, as in a file mapped into memory.

        `kernel_factors` are the scales as one row, [N] or [1].
        """
        layer.packed = _aligned(layer.packed)
        layer.kernel_factors = layer.scale.view(-1)

    def run(self, layer: LowBitLinear, x: Tensor) -> Tensor:
        """y = (x · Qᵀ - offset Σ x) · scale + bias."""
        if x.numel() > FEW_TOKENS * layer.in_features:
            return reference_linear(layer, x)
        packed, factors, offset = buffers(layer, "packed", "kernel_factors", "offset")
        tokens = _bfloat16_tokens(layer, x)
        sums = torch._weight_int8pack_mm(tokens, packed, _ones(layer.out_features)).float()
        if offset is not None:
            total = tokens.sum(-1, keepdim=True, dtype=torch.float32)
            sums -= total * offset.view(-1)
        return _finished(layer, sums.mul_(factors), x)


class Int4WeightCpu(Kernel):
    """``torch._weight_int4pack_mm_for_cpu``: int4 weights of any granularity, bfloat16 inputs.

    The kernel takes (code - 8) · factor + shift, both bfloat16, for groups of 32 to 256. By
    tensor or channel, factor is 1 and shift an integer, and scales are applied to the sums in
    float32; in groups, factor and shift are the rounded scales and offsets.
    """

    name = "int4 weights, bfloat16 inputs"
    tolerance = BFLOAT16_TOLERANCE
    GROUPS = (256, 128, 64, 32)

    def fits(self, layer: LowBitLinear, x: Tensor) -> bool:
        """CPU; K a multiple of 32, N of 16."""
        return (
            layer.spec.inputs is None
            and layer.spec.weight.type == "int4"
            and x.device.type == "cpu"
            and layer.in_features % 32 == 0
            and layer.out_features % 16 == 0
        )

    def group(self, layer: LowBitLinear) -> int:
        """The largest group of the kernel that lies within the layer's groups."""
        sizes = (layer.spec.weight.group_size or layer.in_features, layer.in_features)
        return next(group for group in self.GROUPS if not any(size % group for size in sizes))

    def prepare(self, layer: LowBitLinear) -> None:
        """Orders the codes for the kernel; makes factors and shifts, [K / group, N, 2]."""
        weight = layer.quantized_weight()
        by_group = weight.granularity.kind == "group"
        group = self.group(layer)
        if by_group:
            times = (layer.spec.weight.group_size or group) // group
            count = layer.in_features // group
            scale = weight.scale.repeat_interleave(times, dim=1)[:, :count]
            shift = torch.zeros_like(scale)
            if weight.offset is not None:
                shift = -weight.offset.repeat_interleave(times, dim=1)[:, :count] * scale
            layer.kernel_factors = (
                torch.stack((scale, shift), -1).bfloat16().transpose(0, 1).contiguous()
            )
        elif weight.offset is not None:
            shape = (layer.in_features // group, layer.out_features)
            shift = -weight.offset.view(-1).expand(shape)
            factors = torch.stack((torch.ones_like(shift), shift), -1)
            layer.kernel_factors = factors.bfloat16().contiguous()
        else:
            layer.kernel_factors = _unit_factors(layer.in_features // group, layer.out_features)
        layer.packed = int4_layout.to_kernel(weight.codes)

    def canonical(self, layer: LowBitLinear) -> Tensor:
        """The codes brought back from the kernel's order."""
        codes = int4_layout.from_kernel(layer.packed, layer.in_features)
        return layer.spec.weight.format.pack(codes)

    def run(self, layer: LowBitLinear, x: Tensor) -> Tensor:
        """y = x · Wᵀ, scaled where the kernel has not done it, + bias."""
        packed, factors = buffers(layer, "packed", "kernel_factors")
        tokens = _bfloat16_tokens(layer, x)
        group = layer.in_features // len(factors)
        y = torch._weight_int4pack_mm_for_cpu(tokens, packed, group, factors)
        if layer.spec.weight.strategy != "group":
            y = y.float().mul_(layer.scale.view(-1))
        return _finished(layer, y, x)


class IntegerProduct(Kernel):
    """``torch._int_mm``: int8 inputs and symmetric int8 or int4 weights; exact integer sums.

    Codes of int4 weights are unpacked for each product. Used on devices where it proves exact
    at the ends of the range and fast: without VNNI, x86 instructions saturate there, or torch
    takes a plain loop, many times slower than the reference's products in float32.
    """

    name = "int8 products"

    def fits(self, layer: LowBitLinear, x: Tensor) -> bool:
        """Where the product is exact; on GPUs K and N multiples of 8."""
        return (
            layer.spec.sums_integers
            and layer.spec.weight.symmetric
            and layer.in_features * LARGEST_PRODUCT <= LARGEST_INT32
            and (x.device.type == "cpu" or (layer.in_features | layer.out_features) % 8 == 0)
            and _int_mm_is_exact(x.device)
            and _int_mm_is_fast(x.device)
        )

    def prepare(self, layer: LowBitLinear) -> None:
        """With an offset of the inputs: what it adds to each sum, int32 [N]."""
        if layer.input_offset is not None:
            layer.kernel_factors = -layer.input_offset * layer.codes().sum(1, dtype=torch.int32)

    def run(self, layer: LowBitLinear, x: Tensor) -> Tensor:
        """y = (Q_x · Qᵀ + shift + bias) · scales; rows with NaN give NaN."""
        tokens = divided(layer, x).reshape(-1, layer.in_features)
        if len(tokens) == 1 and x.device.type == "cpu":
            found: tuple[Tensor, Tensor | float] | None = _one_token(layer, tokens)
            if found is None:
                return reference_linear(layer, x)
        else:
            found = _tokens(layer, tokens)
        integers, scale = found
        packed, factors = buffers(layer, "packed", "kernel_factors")
        codes = packed if layer.spec.weight.format.bits == 8 else layer.codes()
        sums = _int_mm(integers, codes.t())
        if factors is not None:
            sums = sums.add_(factors)
        y = scaled_sums(layer, sums, scale, x.dtype)
        return y.view(*x.shape[:-1], layer.out_features)


def _tokens(layer: LowBitLinear, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [M, K] as int8, and their scale, [1] or [M, 1]; NaN for tokens that hold NaN."""
    inputs = layer.input_quantizer()
    assert inputs is not None
    scale, offset = inputs.scales(tokens)
    fmt = _input_format(layer)
    rounded = (tokens / scale).round_()
    if offset is not None:
        rounded.add_(offset)
    rounded.clamp_(fmt.qmin, fmt.qmax)
    # NaN for a token that holds NaN, or infinity and has a scale of its own; 0 for all others.
    spoilt = rounded.sum(-1, keepdim=True).mul_(0)
    return rounded.nan_to_num_(nan=0.0).to(torch.int8), scale + spoilt


def _input_format(layer: LowBitLinear) -> IntFormat:
    inputs = layer.spec.inputs
    assert inputs is not None and isinstance(inputs.format, IntFormat)
    return inputs.format


def _one_token(layer: LowBitLinear, token: Tensor) -> tuple[Tensor, float | Tensor] | None:
    """The same for one token [1, K]; None if it has no usable scale, or holds NaN.

    A dozen tensor operations on one number cost as much as the product: Python does them here.
    """
    fmt = _input_format(layer)
    scale, offset = buffers(layer, "input_scale", "input_offset")
    if scale is None:
        low, high = torch.aminmax(token)
        found = fmt.symmetric_scale(float(low), float(high))
        if not math.isfinite(found):
            return None
        return (token / found).round_().clamp_(fmt.qmin, fmt.qmax).to(torch.int8), found
    rounded = (token / scale).round_()
    if offset is not None:
        rounded.add_(offset)
    rounded.clamp_(fmt.qmin, fmt.qmax)
    if math.isnan(float(rounded.sum())):
        return None
    return rounded.to(torch.int8), scale


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] = int8 [M, K] · int8 [K, N]; GPUs need more than 16 rows."""
    short = 17 - len(a) if a.device.type == "cuda" else 0
    if short <= 0:
        return torch._int_mm(a, b)
    return torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, short)), b)[: len(a)]


@functools.cache
def _int_mm_is_exact(device: torch.device) -> bool:
    """Whether sums of the largest products come out right."""
    lowest = torch.full((32, 64), -128, dtype=torch.int8, device=device)
    ends = torch.where(torch.arange(64, device=device) % 2 == 0, lowest, 127)
    try:
        sums = torch.stack([_int_mm(lowest, w.t()) for w in (lowest, ends)])
    except (RuntimeError, NotImplementedError):
        return False
    expected = torch.stack([lowest.double() @ w.double().t() for w in (lowest, ends)])
    return bool((sums.double() == expected).all())


@functools.cache
def _int_mm_is_fast(device: torch.device) -> bool:
    """Whether a product takes less time than the same in float32; always taken for so on GPUs."""
    if device.type != "cpu":
        return True
    codes = torch.ones(TIMED_SIZE, TIMED_SIZE, dtype=torch.int8, device=device)
    floats = codes.float()

    def least(product: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            product()
            times.append(time.perf_counter() - started)
        return min(times)

    # Both are exact: which one runs does not show in any result.
    return least(lambda: _int_mm(codes, codes.t())) < least(lambda: exact_linear(floats, floats, 1))


def _bfloat16_tokens(layer: LowBitLinear, x: Tensor) -> Tensor:
    tokens = divided(layer, x).bfloat16().reshape(-1, layer.in_features)
    return _aligned(tokens.contiguous())


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy where it does not begin at a multiple of ALIGNMENT bytes."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _finished(layer: LowBitLinear, y: Tensor, x: Tensor) -> Tensor:
    return with_bias(layer, y).to(x.dtype).view(*x.shape[:-1], layer.out_features)


@functools.cache
def _ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


@functools.cache
def _unit_factors(groups: int, rows: int) -> Tensor:
    """Factor 1 and shift 0, shared by all layers of that shape."""
    return torch.tensor([1.0, 0.0], dtype=torch.bfloat16).repeat(groups, rows, 1)


KERNELS: tuple[Kernel, ...] = (Int8WeightCpu(), Int4WeightCpu(), IntegerProduct())
"""In the order in which they are tried."""
