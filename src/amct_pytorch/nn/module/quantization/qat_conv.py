"""What quantization-aware convolutions have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.nn.module.quantization.qat_layer import Operator, QatLayer, check_arguments

# Of torch's layer, attributes and arguments alike.
CONV_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class QatConv(QatLayer):
    """Mixed in before torch's Conv1d, Conv2d or Conv3d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_arguments(type(self).__name__, dtype, padding_mode)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
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
        result: Operator = cls._taken_over(mod, CONV_ARGUMENTS, config)
        return result

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the quantized input with the quantized weight."""
        layer: Any = self
        result: Tensor = layer._conv_forward(*self._operands(input), self.bias)
        return result
