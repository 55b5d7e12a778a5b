"""The one table of what each layer type can do, and what a look at the model says of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import nn


@dataclass(frozen=True)
class LayerKind:
    """What the toolkit knows about one type of layer.

    Attributes:
        name: the type's name in configs and messages, torch's own class name.
        module_class: instances of it (subclasses too) are layers of this kind.
        functions: names of the torch functions one forward of such a layer calls exactly once.
        onnx_ops: op types that the exported call may have.
        out_axis: axis of the weight that counts output channels.
        channel_axis: axis of the layer's input *and* output that counts channels.
        channel_wise_default: whether weights get one scale per output channel by default.
        channel_wise_allowed: whether they may.
        low_bit_weights: whether 6- and 7-bit weights are defined for it.
        input_ranks: smallest and largest number of input dimensions.
    """

    name: str
    module_class: type[nn.Module]
    functions: tuple[str, ...]
    onnx_ops: tuple[str, ...]
    out_axis: int
    channel_axis: int
    channel_wise_default: bool
    channel_wise_allowed: bool
    low_bit_weights: bool
    input_ranks: tuple[int, int]


LAYER_KINDS: MappingProxyType[str, LayerKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            LayerKind("Conv2d", nn.Conv2d, ("conv2d",), ("Conv",), 0, 1, True, True, True, (4, 4)),
            LayerKind(
                "Linear",
                nn.Linear,
                ("linear",),
                ("Gemm", "MatMul"),
                0,
                -1,
                False,
                False,
                False,
                (2, 6),
            ),
        )
    }
)


@dataclass(frozen=True)
class SeenLayer:
    """One layer as a look at the running model found it.

    Attributes:
        name: dotted module path, e.g. ``layer1.0.conv1``.
        kind: key of `LAYER_KINDS`.
        reason: why it cannot be quantized, as one sentence for the user; None if it can.
        in_channels: Cin (for a convolution over all groups together).
        groups: groups of a convolution, 1 for Linear.
        weight_shape: shape of the weight operand of its call.
        input_shape: shape of the call's data operand; empty if there was no single call.
    """

    name: str
    kind: str
    reason: str | None
    in_channels: int
    groups: int
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...] = ()

    @property
    def quantizable(self) -> bool:
        """Whether nothing speaks against quantizing it."""
        return self.reason is None
