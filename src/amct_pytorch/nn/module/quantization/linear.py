"""Linear for quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_pytorch.graph.layers import LAYER_KINDS, LayerKind
from amct_pytorch.nn.module.quantization.qat_layer import Operator, QatLayer, check_arguments


class LinearQAT(QatLayer, nn.Linear):
    """A Linear whose input and weight are quantized while it is trained.

    Use it as torch's Linear: it is one, with the same parameters `weight` and `bias`,
    and adds the learned range of its input. See `QatLayer`.

    Args:
        in_features: as for torch's layer, as are the next ones.
        out_features: likewise.
        bias: likewise.
        device: likewise.
        dtype: float32 only.
        config: see `docs/qat_operators.md`; every key may be left out, None: all defaults. Its
            `channel_wise` cannot be true: the weight has one scale.

    Shape:
        input [N, ..., in_features] of 2 to 6 dimensions, output [N, ..., out_features].

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is not allowed, or the input has
            another number of dimensions.
        ConfigError: the config has unknown keys or values that are not allowed.
    """

    KIND: ClassVar[LayerKind] = LAYER_KINDS["Linear"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_arguments(type(self).__name__, dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin(config)

    @classmethod
    def from_float(
        cls: type[Operator], mod: nn.Module, config: Mapping[str, Any] | None = None
    ) -> Operator:
        """A new operator with copies of the weight and bias of a float layer.

        Args:
            mod: a torch Linear, float32; it is left as it is.
            config: as in the constructor.

        Raises:
            ArgumentTypeError, ArgumentValueError, ConfigError: see the constructor.
        """
        result: Operator = cls._taken_over(mod, ("in_features", "out_features"), config)
        return result

    def forward(self, input: Tensor) -> Tensor:
        """The product of the quantized input with the quantized weight."""
        return functional.linear(*self._operands(input), self.bias)
