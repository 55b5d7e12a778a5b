"""The deploy module of 2-D convolutions: weights stored as 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from amct_pytorch.formats import FORMATS, Granularity
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor

if TYPE_CHECKING:
    from amct_pytorch.low_bit.linear import LinearQuantizeModule


class LowBitConv2d(nn.Module):
    """A convolution whose weight is stored in a floating format of 8 bits.

    =============== ======= =================================================
    buffer          dtype   shape and meaning
    =============== ======= =================================================
    ``packed``      uint8   [N, C / groups, kh, kw]: the codes
    ``scale``       float32 [1] or [N, 1, 1, 1]
    ``input_scale`` float32 [1]
    ``bias``        model's [N]; absent if the layer has none
    =============== ======= =================================================

    y = conv(Q_x(x), W) + bias, computed in float32.

    Attributes:
        wts_type: number format of the weight.
        act_type: number format of the inputs.
        notes: what could not be done as asked.
    """

    packed: Tensor
    scale: Tensor
    input_scale: Tensor
    bias: Tensor | None
    wts_type: str
    act_type: str
    granularity: Granularity
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    notes: list[str]

    def __init__(self, quant_module: LinearQuantizeModule) -> None:
        solved = quant_module.deploy
        assert isinstance(solved, LowBitConv2d)
        super().__init__()
        self._take(solved)

    @classmethod
    def of(cls, solution: LinearSolution, ori: nn.Conv2d, bias: Tensor | None) -> LowBitConv2d:
        """The deploy module of a solution.

        Args:
            solution: what an algorithm found; weight [N, C / groups, kh, kw] without offsets,
                inputs with a static scale.
            ori: the float layer.
            bias: [N] or None.
        """
        weight, inputs = solution.weight, solution.inputs
        assert inputs is not None and inputs.scale is not None
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.wts_type, layer.act_type = weight.fmt.name, inputs.fmt.name
        layer.granularity = weight.granularity
        layer.stride, layer.padding = ori.stride, ori.padding
        layer.dilation, layer.groups = ori.dilation, ori.groups
        layer.dtype = ori.weight.dtype
        layer.notes = []
        layer.register_buffer("packed", weight.codes.view(torch.uint8).clone())
        layer.register_buffer("scale", weight.scale.float().clone())
        layer.register_buffer("input_scale", inputs.scale.float().clone())
        layer.register_buffer("bias", None if bias is None else bias.detach().clone())
        return layer

    def structure(self) -> dict[str, Any]:
        """Everything but the contents of the buffers, for JSON."""
        return {
            "shape": list(self.packed.shape),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "weights": self.wts_type,
            "inputs": self.act_type,
            "strategy": self.granularity.kind,
            "bias": self.bias is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_structure(cls, raw: Mapping[str, Any]) -> LowBitConv2d:
        """A module of that structure with buffers of zeros, to load a state dict into."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.wts_type, layer.act_type = raw["weights"], raw["inputs"]
        layer.granularity = Granularity(raw["strategy"])
        padding = raw["padding"]
        layer.stride, layer.dilation = tuple(raw["stride"]), tuple(raw["dilation"])
        layer.padding = padding if isinstance(padding, str) else tuple(padding)
        layer.groups, layer.dtype, layer.notes = raw["groups"], getattr(torch, raw["dtype"]), []
        shape = tuple(raw["shape"])
        bias = torch.zeros(shape[0], dtype=layer.dtype) if raw["bias"] else None
        layer.register_buffer("packed", torch.zeros(shape, dtype=torch.uint8))
        layer.register_buffer("scale", torch.zeros(layer.granularity.scales_shape(shape)))
        layer.register_buffer("input_scale", torch.zeros(1))
        layer.register_buffer("bias", bias)
        return layer

    def _take(self, other: LowBitConv2d) -> None:
        self.wts_type, self.act_type = other.wts_type, other.act_type
        self.granularity = other.granularity
        self.stride, self.padding = other.stride, other.padding
        self.dilation, self.groups = other.dilation, other.groups
        self.dtype, self.notes = other.dtype, other.notes
        for name in ("packed", "scale", "input_scale", "bias"):
            self.register_buffer(name, getattr(other, name))

    def quantized_weight(self) -> QuantizedTensor:
        """Codes and scales of the weight."""
        fmt = FORMATS[self.wts_type]
        codes = self.packed.view(fmt.code_dtype)
        return QuantizedTensor(codes, self.scale, None, fmt, self.granularity)

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, in the float layer's dtype, computed anew."""
        return self.quantized_weight().dequantize().to(self.dtype)

    def float_bias(self) -> Tensor | None:
        """The bias."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        """The output [B, N, H, W], or without batch [N, H, W], in the dtype of `x`."""
        inputs = InputQuantizer(FORMATS[self.act_type], Granularity("tensor"), self.input_scale)
        y = conv2d(
            inputs.simulate(x),
            self.quantized_weight().dequantize(),
            None if self.bias is None else self.bias.float(),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return y.to(x.dtype)

    def stored_bytes(self) -> int:
        """Bytes of everything in the state dict."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowBitConv2d:
        """Scales keep their dtype when the model is cast to another."""
        before = {name: self._buffers[name] for name in ("scale", "input_scale")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Any = self._buffers[name]
            if old is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Sizes and formats."""
        n, c, kh, kw = self.packed.shape
        return (
            f"{c * self.groups}, {n}, kernel_size={(kh, kw)}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, weights={self.wts_type} by "
            f"{self.granularity.kind}, inputs={self.act_type}, bytes={self.stored_bytes()}"
        )
