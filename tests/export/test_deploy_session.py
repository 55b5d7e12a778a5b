"""Running deploy models: of other tools too, by name of any tensor, with clear errors."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export_networks import case
from onnx import TensorProto, helper, numpy_helper

from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ExportError,
    FileAccessError,
    FileMissingError,
)
from amct_pytorch.export.deploy import build_deploy
from amct_pytorch.export.deploy_session import DeploySession
from amct_pytorch.export.integer_layer import pack_param
from amct_pytorch.export.onnx_file import save_onnx

value = helper.make_tensor_value_info


@pytest.fixture
def session(tmp_path):
    c = case("conv_padding")
    save_onnx(build_deploy(c.model, c.factors), tmp_path / "deploy.onnx")
    return DeploySession(tmp_path / "deploy.onnx"), c.x


def other_tool(nodes, constants, opset=11, output_type=TensorProto.FLOAT, shape=(None, 4, 6, 6)):
    """A deploy model as another tool may write it: old opset, own names."""
    graph = helper.make_graph(
        nodes,
        "g",
        [value("in", TensorProto.FLOAT, shape)],
        [value("out", output_type, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6)


def quant(scale=10.0, offset=3.0, name="q", dst="INT8"):
    return helper.make_node(
        "AscendQuant", ["in"], ["qx"], name=name, scale=scale, offset=offset, dst_type=dst
    )


def dequant(source, param="p", dtype=0):
    return helper.make_node("AscendDequant", [source, param], ["out"], name="dq", dtype=dtype)


def integers(x, scale=10.0, offset=3, bits=8):
    top = 2 ** (bits - 1)
    return np.clip(np.round(x * np.float32(scale)) + offset, -top, top - 1).astype(np.int64)


def run(tmp_path, model, x):
    onnx.save(model, str(tmp_path / "other.onnx"))
    return DeploySession(tmp_path / "other.onnx").run(None, {"in": x})[0]


X = np.random.default_rng(0).normal(0, 6, (2, 4, 6, 6)).astype(np.float32)


def test_average_pool_yields_the_mean_of_integers(tmp_path):
    pool = helper.make_node("AveragePool", ["qx"], ["a"], kernel_shape=[2, 2], strides=[2, 2])
    model = other_tool(
        [quant(), pool, dequant("a")], {"p": pack_param(np.array([0.1], np.float32))}
    )
    mean = (integers(X) - 3).reshape(2, 4, 3, 2, 3, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(run(tmp_path, model, X), mean * np.float32(0.1), rtol=1e-6)


def test_conv_transpose(tmp_path):
    w = np.random.default_rng(1).choice(np.array([-128, 127], np.int8), (4, 3, 2, 2))
    b = np.array([1, -7, 2**24 + 1], np.int32)
    up = helper.make_node("ConvTranspose", ["qx", "w", "b"], ["a"], strides=[2, 2])
    scale = np.array([0.1, 0.2, 0.3], np.float32)
    model = other_tool([quant(), up, dequant("a")], {"w": w, "b": b, "p": pack_param(scale)})
    # kernel 2 and stride 2: no overlap, each output is one product over the channels
    sums = np.einsum("bchw,cnij->bnhiwj", integers(X) - 3, w.astype(np.int64))
    sums = sums.reshape(2, 3, 12, 12) + b.reshape(-1, 1, 1)
    expected = sums.astype(np.float32) * scale.reshape(-1, 1, 1)
    assert np.array_equal(run(tmp_path, model, X), expected)


def test_integers_reshaped_before_the_layer_and_half_precision_behind_it(tmp_path):
    w = np.random.default_rng(2).integers(-128, 128, (144, 5)).astype(np.int8)
    nodes = [
        quant(),
        helper.make_node("Flatten", ["qx"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["a"], name="m"),
        dequant("a", dtype=1),
    ]
    constants = {"w": w, "p": pack_param(np.array([1e-4], np.float32))}
    model = other_tool(nodes, constants, output_type=TensorProto.FLOAT16)
    sums = (integers(X) - 3).reshape(2, -1) @ w.astype(np.int64)
    expected = (sums.astype(np.float32) * np.float32(1e-4)).astype(np.float16)
    assert np.array_equal(run(tmp_path, model, X), expected)


def test_four_bit_inputs(tmp_path):
    w = np.random.default_rng(3).integers(-128, 128, (5, 4, 1, 1)).astype(np.int8)
    conv = helper.make_node("Conv", ["qx", "w"], ["a"])
    nodes = [quant(1.0, -2.0, dst="INT4"), conv, dequant("a")]
    model = other_tool(nodes, {"w": w, "p": pack_param(np.array([0.5], np.float32))})
    centred = integers(X, 1.0, -2, bits=4) + 2
    sums = np.einsum("bchw,nc->bnhw", centred, w[:, :, 0, 0].astype(np.int64))
    assert np.array_equal(run(tmp_path, model, X), sums.astype(np.float32) * np.float32(0.5))


def test_any_tensor_by_name_in_the_order_asked(session):
    run, x = session
    quantized, raw, out = run.run(["head.quant.output0", "stem.y", "head.y"], {"x": x})
    assert (quantized.dtype, raw.dtype, out.dtype) == (np.int8, np.int32, np.float32)
    assert np.array_equal(out, run.run(None, {"x": x})[0])
    assert run.layers == {
        "stem": ("stem.quant.output0", "stem.y"),
        "head": ("head.quant.output0", "head.output0"),
    }


def test_inputs_and_outputs_are_described_as_in_onnx_runtime(session):
    run, _ = session
    (x,), (y,) = run.get_inputs(), run.get_outputs()
    assert (x.name, x.type, x.shape[1:]) == ("x", "tensor(float)", [3, 9, 8])
    assert (y.name, y.type) == ("head.y", "tensor(float)")


def test_session_options_are_used(tmp_path):
    c = case("gemm")
    save_onnx(build_deploy(c.model, c.factors), tmp_path / "deploy.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    DeploySession(tmp_path / "deploy.onnx", options)
    assert (tmp_path / "optimized.onnx").exists()


@pytest.mark.parametrize(
    ("names", "feeds", "error", "message"),
    [
        (["head.x"], {}, ArgumentValueError, r"no tensor 'head.x' \(did you mean 'head.y'\?\)"),
        (None, {"X": np.zeros(3)}, ArgumentValueError, "no input 'X'.*it has x"),
        (None, {}, ArgumentValueError, "input 'x' is missing"),
        (None, {"x": [1.0]}, ArgumentTypeError, "'x' is of type list; numpy.ndarray is needed"),
        (
            None,
            {"x": np.zeros((1, 3, 9, 8))},
            ArgumentTypeError,
            r"'x' is of type float64; tensor\(float\) is needed",
        ),
        (
            None,
            {"x": np.zeros((1, 3, 9, 9), np.float32)},
            ArgumentValueError,
            r"'x' has shape \[1, 3, 9, 9\]",
        ),
        (None, {"x": np.zeros((3, 9, 8), np.float32)}, ArgumentValueError, r"shape \[3, 9, 8\]"),
    ],
)
def test_wrong_names_and_feeds(session, names, feeds, error, message):
    with pytest.raises(error, match=message):
        session[0].run(names, feeds)


def test_files_that_are_no_deploy_models(tmp_path):
    with pytest.raises(FileMissingError, match="nothing"):
        DeploySession(tmp_path / "nothing.onnx")
    with pytest.raises(FileAccessError, match="folder"):
        DeploySession(tmp_path)
    with pytest.raises(ArgumentTypeError, match="deploy_model_file"):
        DeploySession(3)
    for content in (b"", b"no protobuf at all \xff\xff", b"\x08\x08"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ExportError, match="bad"):
            DeploySession(tmp_path / "bad.onnx")


def test_a_file_cut_short(tmp_path):
    c = case("gemm")
    save_onnx(build_deploy(c.model, c.factors), tmp_path / "deploy.onnx")
    data = (tmp_path / "deploy.onnx").read_bytes()
    (tmp_path / "deploy.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ExportError, match="deploy"):
        DeploySession(tmp_path / "deploy.onnx")


CONV = helper.make_node("Conv", ["qx", "w"], ["a"], name="conv")
W = np.ones((5, 4, 1, 1), np.int8)
P = pack_param(np.array([0.5], np.float32))


@pytest.mark.parametrize(
    ("nodes", "constants", "message"),
    [
        (
            [quant(), CONV, dequant("a")],
            {"w": W.astype(np.float32), "p": P},
            "weight 'w' is of type",
        ),
        ([quant(), CONV, dequant("a")], {"w": W, "p": P.astype(np.int64)}, "no UINT64"),
        ([quant(), CONV, dequant("a")], {"w": W, "p": P | np.uint64(1 << 32)}, "weight offsets"),
        ([quant(), CONV, dequant("a")], {"w": W, "p": np.zeros(1, np.uint64)}, "not above 0"),
        ([quant(), CONV, dequant("a")], {"w": W, "p": np.repeat(P, 3)}, "3 scales for 5"),
        ([quant(), CONV, dequant("a", dtype=7)], {"w": W, "p": P}, "dtype is 7"),
        ([quant(scale=0.0), CONV, dequant("a")], {"w": W, "p": P}, "scale is 0"),
        ([quant(offset=300.0), CONV, dequant("a")], {"w": W, "p": P}, "offset is 300"),
        ([quant(dst="INT3"), CONV, dequant("a")], {"w": W, "p": P}, "dst_type is 'INT3'"),
        (
            [helper.make_node("Conv", ["in", "w"], ["a"], name="conv"), dequant("a")],
            {"w": W, "p": P},
            "comes from no AscendQuant",
        ),
        (
            [quant(), helper.make_node("Sigmoid", ["qx"], ["a"], name="s"), dequant("a")],
            {"p": P},
            "Sigmoid 's' between",
        ),
        (
            [quant(), helper.make_node("Conv", ["qx", "w"], ["out"], name="conv")],
            {"w": W},
            "no AscendDequant follows",
        ),
        (
            [quant(), helper.make_node("AscendMagic", ["qx"], ["out"], name="m")],
            {},
            "node 'm' has operator 'AscendMagic', which opset 11",
        ),
        (
            [helper.make_node("Conv", ["in", "w"], ["out"], name="c", domain="vendor")],
            {"w": W},
            "node 'c' has operator Conv of domain 'vendor'",
        ),
    ],
)
def test_models_without_a_meaning(tmp_path, nodes, constants, message):
    onnx.save(other_tool(nodes, constants), str(tmp_path / "other.onnx"))
    with pytest.raises(ExportError, match=message):
        DeploySession(tmp_path / "other.onnx")
