"""A small network as ONNX file, and data for it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

NETWORK = """
<ir_version: 9, opset_import: ["" : 18]>
cnn (float[batch, 3, 8, 8] image) => (float[batch, 4] logits)
{
  a = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
  r = Relu (a)
  d = Conv <pads = [1, 1, 1, 1]> (r, w2)
  e = Add (d, r)
  p = GlobalAveragePool (e)
  f = Flatten (p)
  logits = Gemm <transB = 1> (f, w3, b3)
}
"""


@pytest.fixture
def network(tmp_path):
    """Path of the float model."""
    rng = np.random.default_rng(1)

    def floats(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    model = onnx.parser.parse_model(NETWORK)
    tensors = {
        "w1": floats(8, 3, 3, 3), "b1": floats(8), "w2": floats(8, 8, 3, 3), "w3": floats(4, 8),
        "b3": floats(4),
    }  # fmt: skip
    for name, value in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for name, node in zip(("stem", "", "body", "", "", "", "head"), model.graph.node, strict=True):
        node.name = name
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def samples(tmp_path):
    """Path of 12 samples as .npy."""
    values = np.random.default_rng(2).standard_normal((12, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "samples.npy", values)
    return tmp_path / "samples.npy"


@pytest.fixture
def amct(monkeypatch, tmp_path):
    """Runs the command in the temporary folder; gives click's result."""
    from amct_pytorch.cli.root import amct as group

    monkeypatch.chdir(tmp_path)

    def run(*words):
        return CliRunner().invoke(group, [str(word) for word in words])

    return run
