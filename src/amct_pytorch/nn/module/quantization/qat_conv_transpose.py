"""What quantization-aware transposed convolutions have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amct_pytorch.nn.module.quantization.qat_conv import CONV_ARGUMENTS
from amct_pytorch.nn.module.quantization.qat_layer import Operator, QatLayer, check_arguments


class QatConvTranspose(QatLayer):
    """Mixed in before torch's ConvTranspose1d or ConvTranspose2d.

    Mind the order of the arguments: `dilation` is the sixth, as for a convolution, and
    `output_padding` a keyword at the end; torch's own classes differ.
    """

    FUNCTION: ClassVar[Callable[..., Tensor]]
    DIMENSIONS: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        output_padding: int | tuple[int, ...] = 0,
    ) -> None:
        check_arguments(type(self).__name__, dtype, padding_mode)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias=bias,
            dilation=dilation,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self._begin(config)

    @classmethod
    def from_float(
        cls: type[Operator], mod: nn.Module, config: Mapping[str, Any] | None = None
    ) -> Operator:
        """A new operator with copies of the weight and bias of a float layer.

        Args:
            mod: the torch layer of the same kind, float32; it is left as it is.
            config: as in the constructor.

        Raises:
            ArgumentTypeError, ArgumentValueError, ConfigError: see the constructor.
        """
        keys = (*CONV_ARGUMENTS, "output_padding")
        result: Operator = cls._taken_over(mod, keys, config)
        return result

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution of the quantized input with the quantized weight.

        Args:
            input: as for torch's layer.
            output_size: as for torch's layer.
        """
        x, weight = self._operands(input)
        layer: Any = self
        padding = layer._output_padding(
            input,
            output_size,
            layer.stride,
            layer.padding,
            layer.kernel_size,
            self.DIMENSIONS,
            layer.dilation,
        )
        return type(self).FUNCTION(
            x,
            weight,
            self.bias,
            layer.stride,
            layer.padding,
            padding,
            layer.groups,
            layer.dilation,
        )
