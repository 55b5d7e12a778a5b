"""Where a portable model quantizes what the deploy model keeps in float, and with which code.

Runtimes fuse an operator into an integer kernel only where its output is quantized right behind
it (an activation between them must go). The deploy model quantizes a layer's input, so a
layer's output is mostly quantized by its reader already. Where it is not (a convolution that
feeds a residual Add), the range of its output recorded at calibration gives the code, or both
finite bounds of its activation. (The quantizer behind the Add bounds it too, but so widely that
it cost 1.4 dB on EfficientNet-Lite0; staying in float costs speed only.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto

from amct_pytorch.errors import ExportError
from amct_pytorch.export.deploy import EXTRA_RANGES
from amct_pytorch.export.deploy_reader import DeployModel, Quantizer
from amct_pytorch.export.onnx_graph import OnnxGraph

# Quantizing before these is the same as quantizing behind them.
COMMUTING = frozenset(
    {"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Concat"}
)
WHOLE = (0, 255)


@dataclass(frozen=True)
class Code:
    """Unsigned 8-bit code of real values: q = clip(round(x / scale) + zero, 0, 255).

    Attributes:
        scale: a float32 value.
        zero: the integer of 0.
    """

    scale: float
    zero: int

    @classmethod
    def of(cls, quantizer: Quantizer) -> Code:
        """The integers of an AscendQuant, 128 higher."""
        return cls(float(np.float32(1) / quantizer.inverse_scale), quantizer.offset + 128)

    @classmethod
    def spanning(cls, lo: float, hi: float) -> Code:
        """The code that spreads over [lo, hi] and 0."""
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        scale = float(np.float32((hi - lo) / 255))
        if scale < 2.0**-23:
            return cls(1.0, 0)
        return cls(scale, int(np.clip(np.rint(-lo / scale), *WHOLE)))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value it has an integer for."""
        return (WHOLE[0] - self.zero) * self.scale, (WHOLE[1] - self.zero) * self.scale

    def integer(self, value: float) -> int:
        """The integer of one value, infinite ones included."""
        if math.isinf(value):
            return WHOLE[value > 0]
        scaled = np.rint(np.float32(value) / np.float32(self.scale))
        return int(np.clip(scaled + self.zero, *WHOLE))


@dataclass(frozen=True)
class Closing:
    """An operator's output that is quantized right behind the operator.

    Attributes:
        tensor: the output.
        last: the output behind the activations that follow; what the graph reads from then on.
        activations: these, each the only reader of what it reads.
        bounds: what they limit the values to.
        code: how the values are quantized; None where nothing says.
    """

    tensor: str
    last: str
    activations: tuple[NodeProto, ...]
    bounds: tuple[float, float]
    code: Code | None

    @property
    def limits(self) -> tuple[int, int]:
        """The integers that the activations leave: `WHOLE` where the code does it by itself."""
        assert self.code is not None
        return self.code.integer(self.bounds[0]), self.code.integer(self.bounds[1])


def read_extra_ranges(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Layer name -> range of its output, as recorded at calibration; empty where it was not.

    The model's metadata `amct.extra_ranges` is a JSON object ``{"layer": [lo, hi], ...}``: the
    range of the layer's float output, after a fused BN and before the activation.

    Raises:
        ExportError: the metadata is something else.
    """
    text = next((p.value for p in model.metadata_props if p.key == EXTRA_RANGES), "{}")
    try:
        found = {str(k): (float(lo), float(hi)) for k, (lo, hi) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ExportError(f"the model's metadata {EXTRA_RANGES} cannot be read: {error}") from error
    for name, (lo, hi) in found.items():
        if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
            raise ExportError(
                f"the model's metadata {EXTRA_RANGES} has the range [{lo}, {hi}] for {name!r}"
            )
    return found


def activation_bounds(graph: OnnxGraph, node: NodeProto) -> tuple[float, float] | None:
    """What a Relu or a Clip with constant ends limits values to; None for other operators."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    ends = [-math.inf, math.inf]
    for i, name in enumerate(node.input[1:3]):
        if name:
            value = graph.array(name)
            if value is None or value.size != 1:
                return None
            ends[i] = float(value.reshape(-1)[0])
    return ends[0], ends[1]


class QdqPlan:
    """The closings of a deploy model whose layers stand as float operators already.

    Outputs of the model are never quantized.

    Args:
        deploy: the model; its graph has Conv, Gemm, … on floats and AscendQuant before them.
        extra: recorded output ranges by layer name.

    Attributes:
        closings: where to quantize what the deploy model does not quantize in that place.
        islands: names of convolutions without a code for their output; they stay float.
    """

    def __init__(self, deploy: DeployModel, extra: Mapping[str, tuple[float, float]]) -> None:
        self._graph = deploy.graph
        self._readers = self._graph.readers()
        self._quantizers = {name: Code.of(q) for name, q in deploy.quantizers.items()}
        found = {
            # A Gemm is fused with a float output too; it needs no code but a reader's.
            layer.name: self._closing(layer.output, extra.get(layer.name), layer.node.op_type)
            for layer in deploy.layers
            if layer.node.op_type in ("Conv", "Gemm")
        }
        sums = [
            self._closing(str(node.output[0]), None, "Add")
            for node in self._graph.nodes
            if node.op_type == "Add" and len(set(node.input)) == 2
        ]
        self.closings = [c for c in found.values() if c.code]
        self._add_sums([c for c in sums if c.code])
        convs = {layer.name for layer in deploy.layers if layer.node.op_type == "Conv"}
        self.islands = [name for name, c in found.items() if name in convs and not c.code]

    def _add_sums(self, sums: list[Closing]) -> None:
        """Close the Adds whose operands are both closed: only these run in integers."""
        makers = self._graph.producers()
        while True:
            closed = {c.last for c in self.closings}
            new = [
                c
                for c in sums
                if c.last not in closed and closed.issuperset(makers[c.tensor].input)
            ]
            if not new:
                return
            self.closings += new

    def _wanted(self, tensor: str) -> set[Code]:
        """The codes in which a tensor's readers want it; those behind other operators last."""
        readers = self._readers.get(tensor, [])
        direct = {self._quantizers[n.output[0]] for n in readers if n.output[0] in self._quantizers}
        if direct:
            return direct
        behind = [self._wanted(n.output[0]) for n in readers if n.op_type in COMMUTING]
        return set().union(*behind)

    def _closing(self, tensor: str, extra: tuple[float, float] | None, op_type: str) -> Closing:
        last, lo, hi = tensor, -math.inf, math.inf
        activations: list[NodeProto] = []
        while last not in self._graph.output_names and len(self._readers.get(last, [])) == 1:
            node = self._readers[last][0]
            bounds = activation_bounds(self._graph, node)
            if bounds is None:
                break
            lo, hi = np.clip(lo, *bounds), np.clip(hi, *bounds)
            activations.append(node)
            last = str(node.output[0])
        code = None
        if last not in self._graph.output_names:
            wanted = self._wanted(last)
            if len(wanted) == 1:
                code = wanted.pop()
            elif not wanted and op_type == "Conv":
                code = _code_of_range(extra, (float(lo), float(hi)))
        return Closing(tensor, last, tuple(activations), (float(lo), float(hi)), code)


def _code_of_range(extra: tuple[float, float] | None, bounds: tuple[float, float]) -> Code | None:
    """The code of a range inside bounds, of finite bounds alone, or none."""
    lo, hi = bounds if extra is None else (max(extra[0], bounds[0]), min(extra[1], bounds[1]))
    return Code.spanning(lo, hi) if math.isfinite(lo) and math.isfinite(hi) else None
