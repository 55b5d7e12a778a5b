"""The one table of what each layer type can do, and what a look at the model says of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from amct_pytorch.graph.weight_layout import WeightLayout


def _conv3d_limits(module: nn.Module) -> str | None:
    dilation = getattr(module, "dilation", (1,))[0]
    return None if dilation == 1 else f"its dilation in depth is {dilation}; supported is 1"


def _avg_pool_limits(module: nn.Module) -> str | None:
    divisor = getattr(module, "divisor_override", None)
    return None if divisor is None else f"it has divisor_override {divisor}, which ONNX lacks"


@dataclass(frozen=True)
class LayerKind:
    """What the toolkit knows about one type of layer.

    Attributes:
        name: the type's name in configs and messages, torch's own class name.
        module_class: instances of it (subclasses too) are layers of this kind.
        functions: names of the torch functions one forward of such a layer calls exactly once.
        onnx_ops: op types that the exported call may have.
        input_ranks: smallest and largest number of input dimensions.
        channel_axis: axis of the layer's input *and* output that counts channels.
        out_axis: axis of the weight that counts output channels (those of one group where
            the layer is `transposed`); None for a layer without weights.
        transposed: whether the weight is that of a transposed convolution.
        channel_wise: whether weights may have, and by default get, one scale per output
            channel.
        low_bit_weights: whether 6- and 7-bit weights are defined for it without ADA.
        ada: whether ADA can choose its rounding, from 8 down to 4 bits.
        symmetric_inputs: whether its input never gets a zero point.
        only_trained: whether it is quantized in training only, not by calibration alone.
        limits: the reason why a module of the kind cannot be quantized, or None.
    """

    name: str
    module_class: type[nn.Module]
    functions: tuple[str, ...]
    onnx_ops: tuple[str, ...]
    input_ranks: tuple[int, int]
    channel_axis: int = 1
    out_axis: int | None = 0
    transposed: bool = False
    channel_wise: bool = True
    low_bit_weights: bool = False
    ada: bool = False
    symmetric_inputs: bool = False
    only_trained: bool = False
    limits: Callable[[nn.Module], str | None] = lambda module: None

    @property
    def weighted(self) -> bool:
        """Whether the layer has weights and a bias, and is linear in its input."""
        return self.out_axis is not None

    def __reduce__(self) -> tuple[Callable[[str], LayerKind], tuple[str]]:
        # Copies and pickles of modules that hold a row hold that very row.
        return kind_named, (self.name,)

    def layout(self, groups: int) -> WeightLayout:
        """How the weight of a layer of this kind with so many groups is laid out."""
        assert self.out_axis is not None
        return WeightLayout(self.out_axis, groups if self.transposed else 1)


LAYER_KINDS: MappingProxyType[str, LayerKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            LayerKind("Conv1d", nn.Conv1d, ("conv1d",), ("Conv",), (3, 3), only_trained=True),
            LayerKind(
                "Conv2d",
                nn.Conv2d,
                ("conv2d",),
                ("Conv",),
                (4, 4),
                low_bit_weights=True,
                ada=True,
            ),
            LayerKind(
                "Conv3d",
                nn.Conv3d,
                ("conv3d",),
                ("Conv",),
                (5, 5),
                symmetric_inputs=True,
                limits=_conv3d_limits,
            ),
            LayerKind(
                "ConvTranspose1d",
                nn.ConvTranspose1d,
                ("conv_transpose1d",),
                ("ConvTranspose",),
                (3, 3),
                out_axis=1,
                transposed=True,
                only_trained=True,
            ),
            LayerKind(
                "ConvTranspose2d",
                nn.ConvTranspose2d,
                ("conv_transpose2d",),
                ("ConvTranspose",),
                (4, 4),
                out_axis=1,
                transposed=True,
                ada=True,
            ),
            LayerKind(
                "Linear",
                nn.Linear,
                ("linear",),
                ("Gemm", "MatMul"),
                (2, 6),
                channel_axis=-1,
                channel_wise=False,
                ada=True,
            ),
            LayerKind(
                "AvgPool2d",
                nn.AvgPool2d,
                ("avg_pool2d",),
                ("AveragePool",),
                (4, 4),
                out_axis=None,
                channel_wise=False,
                limits=_avg_pool_limits,
            ),
        )
    }
)
# Those that calibration quantizes, and that a look at a model finds unless others are asked for.
CALIBRATED_KINDS = tuple(name for name, kind in LAYER_KINDS.items() if not kind.only_trained)
ADA_KINDS = frozenset(name for name, kind in LAYER_KINDS.items() if kind.ada)


def kind_named(name: str) -> LayerKind:
    """The row of the table with this name."""
    return LAYER_KINDS[name]


@dataclass(frozen=True)
class SeenLayer:
    """One layer as a look at the running model found it.

    Attributes:
        name: dotted module path, e.g. ``layer1.0.conv1``.
        kind: key of `LAYER_KINDS`.
        reason: why it cannot be quantized, as one sentence for the user; None if it can.
        in_channels: Cin (for a convolution over all groups together; 0 without weights).
        groups: groups of a convolution, 1 for other layers.
        weight_shape: shape of the weight operand of its call; empty without weights.
        input_shape: shape of the call's data operand; empty if there was no single call.
        unreachable: why its one call cannot be answered in its place; None if it can, also
            where something else speaks against quantizing it.
    """

    name: str
    kind: str
    reason: str | None
    in_channels: int
    groups: int
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...] = ()
    unreachable: str | None = None

    @property
    def quantizable(self) -> bool:
        """Whether nothing speaks against quantizing it."""
        return self.reason is None
