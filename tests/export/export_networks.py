"""Small float ONNX networks, one per structure, with made-up factors for their layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from amct_pytorch.export.layer_nodes import tag_layer
from amct_pytorch.record.factors import LayerFactors


class Net:
    """Writes a float network down operator by operator."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape = shape

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def op(self, op_type: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name=f"node_{output}", **attributes)
        )
        return output

    def weights(self, *shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:]))
        return (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def conv(self, name, x, cin, cout, k=3, groups=1, bias=True, **attributes) -> str:
        weight = self.constant(f"{name}.weight", self.weights(cout, cin // groups, k, k))
        inputs = [x, weight]
        if bias:
            inputs.append(self.constant(f"{name}.bias", self.weights(cout, 1)[:, 0]))
        pads = attributes.pop("pads", [k // 2] * 4)
        self.op("Conv", inputs, f"{name}.y", group=groups, pads=pads, **attributes)
        tag_layer(self.nodes[-1], name)
        return f"{name}.y"

    def gemm(self, name, x, cin, cout, bias=True, trans=True, **attributes) -> str:
        weight = self.weights(cout, cin)
        weight = self.constant(f"{name}.weight", weight if trans else weight.T.copy())
        inputs = [x, weight]
        if bias:
            inputs.append(self.constant(f"{name}.bias", self.weights(cout, 1)[:, 0]))
        self.op("Gemm", inputs, f"{name}.y", transB=int(trans), **attributes)
        tag_layer(self.nodes[-1], name)
        return f"{name}.y"

    def matmul(self, name, x, cin, cout, bias=True) -> str:
        weight = self.constant(f"{name}.weight", self.weights(cout, cin).T.copy())
        y = self.op("MatMul", [x, weight], f"{name}.mm")
        tag_layer(self.nodes[-1], name)
        if bias:
            b = self.constant(f"{name}.bias", self.weights(cout, 1)[:, 0])
            y = self.op("Add", [y, b], f"{name}.y")
        return y

    def model(self, *outputs: str) -> onnx.ModelProto:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "net",
            [value("x", TensorProto.FLOAT, [None, *self.shape[1:]])],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        model.metadata_props.add(key="amct.fingerprint", value="abc")
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(model)
        return model

    def data(self, batch: int = 2) -> np.ndarray:
        return self.rng.standard_normal((batch, *self.shape[1:])).astype(np.float32)


def conv_padding() -> tuple[onnx.ModelProto, Net]:
    net = Net(1, 3, 9, 8)
    x = net.conv("stem", "x", 3, 8, strides=[2, 2], pads=[0, 1, 2, 1])
    x = net.op("Relu", [x], "r")
    return net.model(net.conv("head", x, 8, 5, k=1, bias=False)), net


def depthwise() -> tuple[onnx.ModelProto, Net]:
    net = Net(1, 6, 7, 7)
    x = net.conv("dw", "x", 6, 6, groups=6)
    x = net.op(
        "Clip", [x, net.constant("lo", np.float32(0)), net.constant("hi", np.float32(6))], "c"
    )
    return net.model(net.conv("pw", x, 6, 4, k=1)), net


def groups_dilation() -> tuple[onnx.ModelProto, Net]:
    net = Net(1, 8, 12, 12)
    x = net.conv("grouped", "x", 8, 12, groups=4)
    return net.model(net.conv("dilated", x, 12, 4, dilations=[2, 2], pads=[2, 2, 2, 2])), net


def gemm() -> tuple[onnx.ModelProto, Net]:
    net = Net(1, 20)
    x = net.op("Relu", [net.gemm("fc1", "x", 20, 16)], "r")
    x = net.gemm("fc2", x, 16, 7, trans=False, alpha=0.5, beta=2.0)
    return net.model(net.gemm("fc3", x, 7, 3, bias=False)), net


def matmul_3d() -> tuple[onnx.ModelProto, Net]:
    net = Net(1, 5, 12)
    x = net.op("Relu", [net.matmul("fc1", "x", 12, 10)], "r")
    return net.model(net.matmul("fc2", x, 10, 6, bias=False)), net


def shared_input() -> tuple[onnx.ModelProto, Net]:
    """Two layers read the input with equal factors, a third with its own; a residual Add."""
    net = Net(1, 4, 6, 6)
    a, b = net.conv("a", "x", 4, 4), net.conv("b", "x", 4, 4)
    c = net.conv("c", "x", 4, 4, k=1)
    s = net.op("Add", [a, b], "sum")
    r = net.op("Relu", [s], "r")
    d = net.conv("d", r, 4, 4)
    t = net.op("Add", [d, s], "sum2")
    return net.model(t, net.op("Add", [c, t], "out")), net


NETWORKS = {
    f.__name__: f for f in (conv_padding, depthwise, groups_dilation, gemm, matmul_3d, shared_input)
}


@dataclass
class Case:
    """A float model, factors from its own data, and that data."""

    model: onnx.ModelProto
    factors: dict[str, LayerFactors]
    x: np.ndarray


def layer_inputs(model: onnx.ModelProto) -> dict[str, str]:
    return {
        p.value: node.input[0]
        for node in model.graph.node
        for p in node.metadata_props
        if p.key == "amct.layer"
    }


def tensors(model: onnx.ModelProto, names: list[str], feeds: dict) -> dict[str, np.ndarray]:
    """Values of any tensors of a stock model."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    have = {o.name for o in probe.graph.output}
    wanted = [n for n in dict.fromkeys(names) if n not in feeds]
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in have)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return {**feeds, **dict(zip(wanted, session.run(wanted, feeds), strict=True))}


def factors_for(
    model: onnx.ModelProto, x: np.ndarray, per_channel: bool = True, symmetric: bool = False
) -> dict[str, LayerFactors]:
    """Min-max factors of every layer, from one batch."""
    inputs = layer_inputs(model)
    seen = tensors(model, list(inputs.values()), {"x": x})
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        name = next((p.value for p in node.metadata_props if p.key == "amct.layer"), None)
        if name is None:
            continue
        w = weights[node.input[1]]
        trans = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
        rows = w.reshape(w.shape[0], -1) if trans else w.T
        scale_w = (
            np.abs(rows).max(1) / 127 if per_channel else np.abs(rows).max(keepdims=True) / 127
        )
        value = seen[inputs[name]]
        lo, hi = min(0.0, float(value.min())), max(0.0, float(value.max()))
        if symmetric:
            scale, offset = max(hi, -lo) / 127, 0
        else:
            scale = (hi - lo) / 255
            offset = int(np.clip(-128 - np.round(lo / scale), -128, 127))
        found[name] = LayerFactors(tuple(map(float, scale_w.ravel())), scale, offset)
    return found


def case(name: str, **options) -> Case:
    model, net = NETWORKS[name]()
    x = net.data()
    return Case(model, factors_for(model, x, **options), x)
