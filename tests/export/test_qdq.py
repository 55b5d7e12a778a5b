"""The portable QDQ model: right, fused, and honest about what it could not fuse."""

import json
import logging
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export_networks import NETWORKS, Net, case, factors_for, tensors
from onnx import helper, numpy_helper

from amct_pytorch.errors import ExportError, FileAccessError, FileMissingError
from amct_pytorch.export.deploy import build_deploy
from amct_pytorch.export.deploy_session import DeploySession
from amct_pytorch.export.onnx_file import save_onnx
from amct_pytorch.export.qdq import deploy_to_qdq, qdq_model
from amct_pytorch.export.qdq_plan import Code


def options(**paths):
    """One thread, and exact products on x86 without VNNI (no effect elsewhere)."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = 1
    chosen.add_session_config_entry("session.x64quantprecision", "1")
    if paths:
        chosen.optimized_model_filepath = str(paths["optimized"])
    return chosen


def run(model, names, x):
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    have = {o.name for o in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    session = ort.InferenceSession(
        probe.SerializeToString(), options(), providers=["CPUExecutionProvider"]
    )
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def fused_operators(model, tmp_path):
    """Operator counts of the graph that ONNX Runtime really runs."""
    file = tmp_path / "optimized.onnx"
    ort.InferenceSession(
        model.SerializeToString(), options(optimized=file), providers=["CPUExecutionProvider"]
    )
    return Counter(n.op_type for n in onnx.load(str(file)).graph.node)


def with_ranges(model, ranges):
    model.metadata_props.add(key="amct.extra_ranges", value=json.dumps(ranges))
    return model


def output_ranges(model, x, layers):
    makers = {
        p.value: n.output[0]
        for n in model.graph.node
        for p in n.metadata_props
        if p.key == "amct.layer"
    }
    seen = tensors(model, [makers[name] for name in layers], {"x": x})
    return {n: [float(seen[makers[n]].min()), float(seen[makers[n]].max())] for n in layers}


def residual(features=False):
    """Bottleneck blocks as in MobileNetV2: a convolution without activation feeds an Add.

    With `features`, the model ends in its last convolution.
    """
    net = Net(1, 8, 10, 10)
    low, high = net.constant("low", np.float32(0)), net.constant("high", np.float32(6))
    x = net.conv("stem", "x", 8, 8)
    for i in range(3):
        y = net.op("Clip", [net.conv(f"{i}.expand", x, 8, 24, k=1), low, high], f"{i}.c1")
        y = net.op("Clip", [net.conv(f"{i}.deep", y, 24, 24, groups=24), low, high], f"{i}.c2")
        x = net.op("Add", [net.conv(f"{i}.project", y, 24, 8, k=1), x], f"{i}.sum")
    x = net.conv("head", x, 8, 16, k=1)
    if features:
        return net.model(x), net
    x = net.op("Relu", [x], "r")
    x = net.op("GlobalAveragePool", [x], "g")
    x = net.op("Flatten", [x], "f")
    return net.model(net.gemm("fc", x, 16, 5)), net


@pytest.fixture
def bottlenecks():
    model, net = residual()
    x = net.data(4)
    return model, factors_for(model, x), x


FEED_ADDS = ("0.project", "1.project", "2.project")


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_first_layer_is_at_most_one_step_off(tmp_path, network, symmetric, per_channel):
    """Same input: the second layers' integers differ from the exact ones by one at most."""
    c = case(network, symmetric=symmetric, per_channel=per_channel)
    deploy = build_deploy(c.model, c.factors)
    save_onnx(deploy, tmp_path / "deploy.onnx")
    quants = [n.output[0] for n in deploy.graph.node if n.op_type == "AscendQuant"]
    exact = DeploySession(tmp_path / "deploy.onnx")
    want = dict(zip(quants, exact.run(quants, {"x": c.x}), strict=True))
    qdq, _ = qdq_model(deploy)
    onnx.checker.check_model(qdq, full_check=True)
    found = run(qdq, quants, c.x)
    first = quants[0]
    assert np.array_equal(found[first].astype(int) - 128, want[first])
    for name in quants[1:]:
        # gemm's third layer has two roundings before it
        steps = 2 if name.startswith("fc3") else 1
        assert np.abs(found[name].astype(int) - 128 - want[name]).max() <= steps, name
        assert (found[name].astype(int) - 128 != want[name]).mean() < 0.02, name


@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_are_near_the_exact_ones(tmp_path, network):
    c = case(network)
    deploy = build_deploy(c.model, c.factors)
    save_onnx(deploy, tmp_path / "deploy.onnx")
    session = DeploySession(tmp_path / "deploy.onnx")
    names = [o.name for o in session.get_outputs()]
    exact = dict(zip(names, session.run(names, {"x": c.x}), strict=True))
    found = run(qdq_model(deploy)[0], names, c.x)
    for name in names:
        noise = np.square(found[name] - exact[name]).sum() / np.square(exact[name]).sum()
        # An integer here and there is a step off: far less than quantization itself costs.
        assert noise < 1e-4


def test_stored_as_int8_with_int32_bias_and_standard_operators(bottlenecks):
    model, factors, _ = bottlenecks
    deploy = build_deploy(model, factors)
    qdq, _ = qdq_model(with_ranges(deploy, {}))
    assert qdq.opset_import[0].version >= 17
    assert [o.domain for o in qdq.opset_import] == [""]
    assert {n.domain for n in qdq.graph.node} == {""}
    assert not [n for n in qdq.graph.node if n.op_type.startswith("Ascend")]
    constants = {t.name: numpy_helper.to_array(t) for t in qdq.graph.initializer}
    integers = {t.name: numpy_helper.to_array(t) for t in deploy.graph.initializer}
    makers = {n.output[0]: n for n in qdq.graph.node}
    layers = [n for n in qdq.graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(layers) == len(factors)
    for node in layers:
        x, weight, bias = (makers[name] for name in node.input)
        assert {x.op_type, weight.op_type, bias.op_type} == {"DequantizeLinear"}
        assert np.array_equal(constants[weight.input[0]], integers[f"{node.name}.weight"])
        assert constants[weight.input[0]].dtype == np.int8
        assert np.array_equal(constants[bias.input[0]], integers[f"{node.name}.bias"])
        assert constants[x.input[2]].dtype == np.uint8
        assert constants[x.input[2]].shape == ()
        s_x, s_w, s_b = (constants[n.input[1]] for n in (x, weight, bias))
        assert np.array_equal(s_b, s_w * s_x)
        np.testing.assert_allclose(s_w, factors[node.name].scale_w, rtol=1e-6)
        np.testing.assert_allclose(s_x, factors[node.name].scale_d, rtol=1e-6)


def test_with_recorded_ranges_everything_fuses(bottlenecks, tmp_path, caplog):
    model, factors, x = bottlenecks
    ranges = output_ranges(model, x, [*FEED_ADDS, "head"])
    qdq, islands = qdq_model(with_ranges(build_deploy(model, factors), ranges))
    assert islands == []
    ran = fused_operators(qdq, tmp_path)
    assert ran["QLinearConv"] == 11
    assert ran["QLinearAdd"] == 3
    assert ran["QLinearGlobalAveragePool"] + ran["GlobalAveragePool"] == 1
    assert ran["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Add", "Clip", "Relu"} & set(ran)


def test_without_ranges_it_is_right_and_says_what_stays_float(bottlenecks, tmp_path, caplog):
    model, factors, x = bottlenecks
    save_onnx(build_deploy(model, factors), tmp_path / "deploy.onnx")
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        deploy_to_qdq(tmp_path / "deploy.onnx", tmp_path / "qdq.onnx")
    assert (
        "4 convolutions, so they run in float: 0.project, 1.project, 2.project, head" in caplog.text
    )
    qdq = onnx.load(str(tmp_path / "qdq.onnx"))
    assert fused_operators(qdq, tmp_path)["QLinearConv"] == 7
    exact = DeploySession(tmp_path / "deploy.onnx").run(None, {"x": x})[0]
    found = run(qdq, ["fc.y"], x)["fc.y"]
    assert np.square(found - exact).sum() / np.square(exact).sum() < 1e-3


@pytest.mark.parametrize("ranges", [True, False])
def test_noise_to_float_is_near_the_deploy_models(tmp_path, ranges):
    model, net = residual(features=True)
    x = net.data(8)
    deploy = build_deploy(model, factors_for(model, x))
    save_onnx(deploy, tmp_path / "deploy.onnx")
    if ranges:
        with_ranges(deploy, output_ranges(model, x, FEED_ADDS))
    real = tensors(model, ["head.y"], {"x": x})["head.y"]
    exact = DeploySession(tmp_path / "deploy.onnx").run(None, {"x": x})[0]
    qdq, islands = qdq_model(deploy)
    assert len(islands) == (1 if ranges else 4)
    found = run(qdq, ["head.y"], x)["head.y"]
    lost = 10 * np.log10(np.square(found - real).sum() / np.square(exact - real).sum())
    # With ranges, three residual sums and their operands are rounded to 8 bits once more. Beside
    # the few other roundings of so small a network that may double the noise (3 dB);
    # EfficientNet-Lite0 loses 0.3 dB.
    assert lost < (3.0 if ranges else 0.5)


def tail(*nodes_after, output="out"):
    """conv -> given operators -> conv, the first of which may end in an integer Clip."""
    net = Net(1, 4, 8, 8)
    net.constant("zero", np.float32(0))
    net.constant("two", np.float32(2))
    x = net.conv("a", "x", 4, 6)
    for i, (op_type, *rest) in enumerate(nodes_after):
        *constants, attributes = [*rest, {}] if not rest or isinstance(rest[-1], str) else rest
        x = net.op(op_type, [x, *constants], f"t{i}", **attributes)
    return net.model(net.conv("b", x, 6, 3)), net


POOL = ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]})


@pytest.mark.parametrize(
    ("between", "widen", "clips"),
    [
        ([("Relu",)], 1.0, 0),
        ([("Clip", "zero", "two")], 1.0, 0),
        ([("Clip", "zero", "two")], 1.7, 1),
        ([("Relu",), POOL], 1.0, 0),
        ([POOL], 1.0, 0),
        ([("Relu",), ("Identity",)], 1.0, 0),
    ],
)
def test_activations_go_where_the_quantizer_does_their_work(tmp_path, between, widen, clips):
    model, net = tail(*between)
    x = net.data(3) * 2
    factors = factors_for(model, x)
    b = factors["b"]
    factors["b"] = type(b)(b.scale_w, b.scale_d * widen, b.offset_d)
    deploy = build_deploy(model, factors)
    save_onnx(deploy, tmp_path / "deploy.onnx")
    qdq, islands = qdq_model(deploy)
    assert islands == ["b"]  # the model's output stays float
    kinds = Counter(n.op_type for n in qdq.graph.node)
    assert kinds["Relu"] == 0
    assert kinds["Clip"] == clips
    assert fused_operators(qdq, tmp_path)["QLinearConv"] == 1
    name = "b.quant.output0"
    want = DeploySession(tmp_path / "deploy.onnx").run([name], {"x": x})[0]
    found = run(qdq, [name], x)[name].astype(int) - 128
    assert np.abs(found - want).max() <= 1
    assert (found != want).mean() < 0.02


def test_an_activation_under_a_symmetric_quantizer_becomes_a_clip_of_integers(tmp_path):
    model, net = tail(("Relu",))
    x = net.data(3)
    deploy = build_deploy(model, factors_for(model, x, symmetric=True))
    save_onnx(deploy, tmp_path / "deploy.onnx")
    qdq, _ = qdq_model(deploy)
    (clip,) = [n for n in qdq.graph.node if n.op_type == "Clip"]
    constants = {t.name: numpy_helper.to_array(t) for t in qdq.graph.initializer}
    assert constants[clip.input[1]] == 128
    assert constants[clip.input[1]].dtype == np.uint8
    name = "b.quant.output0"
    want = DeploySession(tmp_path / "deploy.onnx").run([name], {"x": x})[0]
    assert want.min() == 0
    assert np.abs(run(qdq, [name], x)[name].astype(int) - 128 - want).max() <= 1


def test_two_readers_with_different_quantizers_stay_exact(tmp_path):
    c = case("shared_input")
    net = Net(1, 4, 6, 6)
    a = net.conv("a", "x", 4, 4)
    out = net.op("Add", [net.conv("b", a, 4, 4), net.conv("c", a, 4, 4)], "y")
    model, x = net.model(out), c.x
    factors = factors_for(model, x)
    factors["c"] = type(factors["c"])(factors["c"].scale_w, factors["c"].scale_d * 3, 5)
    deploy = build_deploy(model, factors)
    save_onnx(deploy, tmp_path / "deploy.onnx")
    qdq, islands = qdq_model(deploy)
    assert "a" in islands
    names = ["b.quant.output0", "c.quant.output0"]
    want = DeploySession(tmp_path / "deploy.onnx").run(names, {"x": x})
    found = run(qdq, names, x)
    for name, exact in zip(names, want, strict=True):
        assert np.abs(found[name].astype(int) - 128 - exact).max() <= 1


def test_a_layer_output_that_is_a_model_output_is_not_rounded(bottlenecks):
    model, factors, x = bottlenecks
    model.graph.output.append(helper.make_tensor_value_info("2.project.y", 1, [None, 8, 10, 10]))
    ranges = output_ranges(model, x, FEED_ADDS)
    qdq, islands = qdq_model(with_ranges(build_deploy(model, factors), ranges))
    assert "2.project" in islands
    makers = {n.output[0]: n for n in qdq.graph.node}
    assert makers["2.project.y"].op_type == "Conv"


@pytest.mark.parametrize("text", ["[1]", "no json", '{"a": 1}', '{"a": [1, 0]}', '{"a": [0, NaN]}'])
def test_metadata_that_is_no_ranges(bottlenecks, text):
    deploy = build_deploy(*bottlenecks[:2])
    deploy.metadata_props.add(key="amct.extra_ranges", value=text)
    with pytest.raises(ExportError, match=r"amct\.extra_ranges"):
        qdq_model(deploy)


def test_codes():
    assert Code.spanning(0.5, 2.0) == Code(float(np.float32(2 / 255)), 0)
    assert Code.spanning(0.0, 0.0) == Code(1.0, 0)
    code = Code.spanning(-1.0, 3.0)
    assert code.zero == 64
    assert [code.integer(v) for v in (-np.inf, -9.0, 0.0, 9.0, np.inf)] == [0, 0, 64, 255, 255]


def test_bad_paths(tmp_path):
    with pytest.raises(FileMissingError, match="deploy_model_file"):
        deploy_to_qdq(tmp_path / "nothing.onnx", tmp_path / "qdq.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(ExportError, match="deploy_model_file"):
        deploy_to_qdq(tmp_path / "bad.onnx", tmp_path / "qdq.onnx")
    with pytest.raises(FileAccessError, match="save_file"):
        deploy_to_qdq(tmp_path / "bad.onnx", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["bad.onnx"]
