"""Conv1d for quantization-aware training."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from amct_pytorch.graph.layers import LAYER_KINDS, LayerKind
from amct_pytorch.nn.module.quantization.qat_conv import QatConv


class Conv1dQAT(QatConv, nn.Conv1d):
    """A Conv1d whose input and weight are quantized while it is trained.

    Use it as torch's Conv1d: it is one, with the same parameters `weight` and `bias`,
    and adds the learned range of its input. See `QatLayer`.

    Args:
        in_channels: as for torch's layer, as are the next ones.
        out_channels: likewise.
        kernel_size: likewise.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        groups: likewise.
        bias: likewise.
        padding_mode: ``zeros`` only.
        device: likewise.
        dtype: float32 only.
        config: see `docs/qat_operators.md`; every key may be left out, None: all defaults.

    Shape:
        input [N, Cin, L], output [N, Cout, L'].

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is not allowed, or the input has
            another number of dimensions.
        ConfigError: the config has unknown keys or values that are not allowed.
    """

    KIND: ClassVar[LayerKind] = LAYER_KINDS["Conv1d"]
