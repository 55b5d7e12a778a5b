"""What an algorithm finds for one linear layer: everything that its deploy module needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import (
    Granularity,
    IntFormat,
    NumberFormat,
    dequantize,
    fake_quantize,
    params_of,
    quantize,
)


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and what they stand for.

    Attributes:
        codes: unpacked, of the format's code dtype, in the tensor's shape.
        scale: float32 of the granularity's `scales_shape`.
        offset: int32 of the same shape, within the format's range; None for symmetric
            quantization.
        fmt: the number format.
        granularity: which elements share a scale.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    fmt: NumberFormat
    granularity: Granularity

    @classmethod
    def nearest(
        cls,
        x: Tensor,
        fmt: NumberFormat,
        granularity: Granularity,
        *,
        symmetric: bool = True,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> QuantizedTensor:
        """`x` rounded to the nearest; scales by its extremes unless `scale` is given."""
        if scale is None:
            params = params_of(x, fmt, granularity, symmetric=symmetric)
            scale, offset = params.scale, params.offset
        codes = quantize(x, scale, offset, fmt, granularity)
        return cls(codes, scale, offset, fmt, granularity)

    def dequantize(self) -> Tensor:
        """The numbers, float32."""
        return dequantize(self.codes, self.scale, self.offset, self.fmt, self.granularity)


@dataclass(frozen=True)
class InputQuantizer:
    """How a layer's inputs are quantized.

    Attributes:
        fmt: the number format.
        granularity: kind tensor, token or group.
        scale: float32 [1]; None: computed from the data at hand, for each token or block.
        offset: int32 [1], within the format's range; None for symmetric quantization.
    """

    fmt: NumberFormat
    granularity: Granularity
    scale: Tensor | None = None
    offset: Tensor | None = None

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed from the data at hand."""
        return self.scale is None

    @property
    def integer_static(self) -> bool:
        """Whether products with integer weights per channel can be summed as integers."""
        return isinstance(self.fmt, IntFormat) and not self.dynamic

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and offset for `x`, of the granularity's `scales_shape`."""
        if self.scale is not None:
            return self.scale, self.offset
        params = params_of(x, self.fmt, self.granularity)
        return params.scale, params.offset

    def simulate(self, x: Tensor) -> Tensor:
        """`x` after quantization and dequantization, float32."""
        scale, offset = self.scales(x)
        return fake_quantize(x.float(), scale, offset, self.fmt, self.granularity)


@dataclass(frozen=True)
class LinearSolution:
    """A quantized linear layer.

    y = Q_x(x / divisor) · Wᵀ + bias, with W the quantized weight (which has already been
    multiplied by the divisor).

    Attributes:
        weight: [N, K].
        inputs: how x is quantized; None: not.
        divisor: float32 [K], positive; None: ones.
        bias: floating [N], where the algorithm changed it; None: the layer's own.
        clip_max: what the weights were clipped to, to be told; None: nothing was.
        notes: what was damped, clipped or fell back, for the ledger.
    """

    weight: QuantizedTensor
    inputs: InputQuantizer | None = None
    divisor: Tensor | None = None
    bias: Tensor | None = None
    clip_max: Tensor | None = None
    notes: tuple[str, ...] = ()

    def dequantized_weight(self) -> Tensor:
        """The weight that stands for the float layer's, float32 [N, K]."""
        weight = self.weight.dequantize()
        return weight if self.divisor is None else weight / self.divisor

    def check_offsets(self) -> None:
        """Whether offsets are integers of their formats: what stores them, and sums, rest on it.

        Raises:
            ArgumentValueError: one is not.
        """
        for what, part in (("weight", self.weight), ("inputs", self.inputs)):
            if part is None or part.offset is None or not isinstance(part.fmt, IntFormat):
                continue
            low, high = part.fmt.qmin, part.fmt.qmax
            for end in map(int, part.offset.aminmax()):
                if not low <= end <= high:
                    raise ArgumentValueError(
                        f"{what}: an offset is {end}; allowed for {part.fmt.name}: {low} to {high}"
                    )
