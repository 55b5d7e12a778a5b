"""An ONNX file as a torch module: the same results, layers named after nodes, clear refusals."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from amct_pytorch.errors import ExportError, FileMissingError, ModelError
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.importing.reader import read_onnx_module

RNG = np.random.default_rng(0)


def saved(tmp_path, text: str, tensors: dict[str, np.ndarray], names: dict[str, str] = {}):  # noqa: B006
    """A model in ONNX's own text form, as a file; nodes that make a tensor can be named."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{text}')
    for name, value in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for node in model.graph.node:
        node.name = names.get(node.output[0], node.name)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def same_as_runtime(path, *arrays: np.ndarray):
    read = read_onnx_module(path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = dict(zip(read.module.input_names, arrays, strict=True))
    with torch.no_grad():
        found = read.module(*map(torch.from_numpy, arrays))
    for meant, got in zip(
        session.run(None, feeds), found if isinstance(found, tuple) else (found,), strict=True
    ):
        # Two runtimes add in other orders.
        np.testing.assert_allclose(got.numpy(), meant, rtol=1e-4, atol=1e-4)
    return read


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CNN = """
cnn (float[batch, 3, 9, 9] image) => (float[batch, 5] logits)
{
  a = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
  n = BatchNormalization <epsilon = 0.01> (a, s, t, m, v)
  c = Clip (n, zero, six)
  d = Conv <pads = [0, 1, 2, 1], strides = [2, 2], group = 4> (c, w2)
  p = AveragePool <kernel_shape = [2, 2]> (d)
  f = Flatten (p)
  logits = Gemm <transB = 1> (f, w3, b3)
}
"""


def cnn(tmp_path, names=None):
    tensors = {
        "w1": floats(8, 3, 3, 3), "b1": floats(8), "s": floats(8), "t": floats(8),
        "m": floats(8), "v": floats(8) ** 2 + 0.5, "zero": np.float32(0), "six": np.float32(6),
        "w2": floats(8, 2, 3, 3), "w3": floats(5, 128), "b3": floats(5),
    }  # fmt: skip
    named = {"a": "/stem/Conv", "d": "layer1.0.conv", "logits": "head"} if names is None else names
    return saved(tmp_path, CNN, {k: np.asarray(v) for k, v in tensors.items()}, named)


def test_a_cnn_is_the_same_and_its_layers_are_named_after_its_nodes(tmp_path):
    read = same_as_runtime(cnn(tmp_path), floats(2, 3, 9, 9))
    assert read.layer_nodes["/stem/Conv"] == "/stem/Conv"
    assert isinstance(read.module.get_submodule("/stem/Conv"), nn.Conv2d)
    assert isinstance(read.module.get_submodule("layer1.0.conv"), nn.Conv2d)
    assert isinstance(read.module.get_submodule("head"), nn.Linear)
    assert read.dynamic_axes == {"image": {0: "batch"}, "logits": {0: "batch"}}


def test_flows_see_its_layers_and_the_norm_behind_one(tmp_path):
    read = read_onnx_module(cnn(tmp_path))
    graph = look_at(read.module, ModelInputs.of(torch.zeros(1, 3, 9, 9)))
    found = {layer.name: layer.kind for layer in graph.layers if layer.quantizable}
    assert found == {
        "/stem/Conv": "Conv2d", "layer1.0.conv": "Conv2d", "AveragePool_4": "AvgPool2d",
        "head": "Linear",
    }  # fmt: skip
    assert list(graph.fusable_norms) == ["/stem/Conv"]


@pytest.mark.parametrize("name", ["training", "forward", "a..b", "constants", "layer1.0", ""])
def test_names_that_no_module_can_have_are_changed(tmp_path, name):
    path = cnn(tmp_path, {"a": name, "d": "layer1.0.conv", "logits": "layer1"})
    read = same_as_runtime(path, floats(1, 3, 9, 9))
    assert len(read.layer_nodes) == 5
    assert "layer1.0.conv" in read.layer_nodes.values()


def test_a_matrix_product_and_the_bias_behind_it_are_one_linear(tmp_path):
    text = """
    mlp (float[n, t, 6] x) => (float[n, t, 4] y)
    {
      a = MatMul (x, w1)
      b = Add (b1, a)
      g = Gelu (b)
      c = MatMul (g, w2)
      y = Add (c, shape_too)
    }
    """.replace("Gelu (b)", "Tanh (b)")
    tensors = {
        "w1": floats(6, 8), "b1": floats(8), "w2": floats(8, 4), "shape_too": floats(3, 1)
    }  # fmt: skip
    read = same_as_runtime(saved(tmp_path, text, tensors), floats(2, 3, 6))
    biases = [m.bias is not None for m in read.module.modules() if isinstance(m, nn.Linear)]
    # [3, 1] adds a number to each row: no bias.
    assert biases == [True, False]


def test_one_weight_read_by_two_nodes_is_one_parameter(tmp_path):
    text = """
    twice (float[n, 4] x) => (float[n, 4] y) { a = MatMul (x, w)  r = Relu (a)  y = MatMul (r, w) }
    """
    read = same_as_runtime(saved(tmp_path, text, {"w": floats(4, 4)}), floats(3, 4))
    graph = look_at(read.module, ModelInputs.of(torch.zeros(1, 4)))
    assert all("shares memory" in str(layer.reason) for layer in graph.layers)


def test_sizes_stay_numbers_so_that_a_batch_axis_stays_free(tmp_path):
    text = """
    reshaped (float[batch, 6] x) => (float[?, 3, 2] y)
    {
      s = Shape (x)
      n = Gather (s, first)
      u = Unsqueeze (n, axis)
      t = Concat <axis = 0> (u, rest)
      y = Reshape (x, t)
    }
    """
    tensors = {
        "first": np.int64(0), "axis": np.array([0]), "rest": np.array([3, 2])
    }  # fmt: skip
    read = same_as_runtime(
        saved(tmp_path, text, {k: np.asarray(v) for k, v in tensors.items()}), floats(5, 6)
    )
    exported = torch.export.export(
        read.module, (torch.zeros(2, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert exported.module()(torch.zeros(7, 6)).shape == (7, 3, 2)


def test_what_is_quantized_already_is_refused(tmp_path):
    text = """
    q (float[n, 4] x) => (float[n, 4] y)
    { a = QuantizeLinear (x, s, z)  y = DequantizeLinear (a, s, z) }
    """
    path = saved(tmp_path, text, {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8)})
    with pytest.raises(ModelError, match=r"quantized already: it has 2 nodes such as Quantize"):
        read_onnx_module(path)


def test_all_operators_that_cannot_be_read_are_named(tmp_path):
    text = """
    odd (float[n, 4] x) => (float[n, 4] y) { a = Det (x)  b = Hardmax (x)  y = Hardmax (b) }
    """
    with pytest.raises(ModelError, match=r"Det \(1, first .*Hardmax \(2, first .*module:factory"):
        read_onnx_module(saved(tmp_path, text, {}))


def test_what_is_no_onnx_file_is_said(tmp_path):
    with pytest.raises(FileMissingError, match="MODEL: there is no file"):
        read_onnx_module(tmp_path / "none.onnx", "MODEL")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ExportError, match="not a readable ONNX model: it is text"):
        read_onnx_module(tmp_path / "text.onnx")
    (tmp_path / "text.onnx").write_text('{"record": "of something"}')
    with pytest.raises(ExportError, match=r"text\.onnx' is JSON, not an ONNX model"):
        read_onnx_module(tmp_path / "text.onnx")


def test_functions_of_the_model_are_read_too(tmp_path):
    body = helper.make_function(
        "own", "double", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("double", ["x"], ["y"], domain="own")], "g",
        [helper.make_tensor_value_info("x", 1, [2])], [helper.make_tensor_value_info("y", 1, [2])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=9)
    onnx.save(model, tmp_path / "f.onnx")
    same_as_runtime(tmp_path / "f.onnx", floats(2))
