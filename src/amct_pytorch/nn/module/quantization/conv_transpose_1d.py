"""ConvTranspose1d for quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from amct_pytorch.graph.layers import LAYER_KINDS, LayerKind
from amct_pytorch.nn.module.quantization.qat_conv_transpose import QatConvTranspose


class ConvTranspose1dQAT(QatConvTranspose, nn.ConvTranspose1d):
    """A ConvTranspose1d whose input and weight are quantized while it is trained.

    Use it as torch's ConvTranspose1d: it is one, with the same parameters `weight` and `bias`,
    and adds the learned range of its input. See `QatLayer`.

    Mind the order of the arguments: `dilation` is the sixth, as for a convolution.

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
        output_padding: keyword only; as for torch's layer.

    Shape:
        input [N, Cin, L], output [N, Cout, L'].

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is not allowed, or the input has
            another number of dimensions.
        ConfigError: the config has unknown keys or values that are not allowed.
    """

    KIND: ClassVar[LayerKind] = LAYER_KINDS["ConvTranspose1d"]
    FUNCTION: ClassVar[Callable[..., Tensor]] = functional.conv_transpose1d
    DIMENSIONS: ClassVar[int] = 1
