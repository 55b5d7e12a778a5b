"""From quantization-aware operators to a QDQ file, and from that to what is deployed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ExportError,
    FileMissingError,
)
from amct_pytorch.nn.module.quantization import (
    Conv1dQAT,
    Conv2dQAT,
    Conv3dQAT,
    ConvTranspose1dQAT,
    ConvTranspose2dQAT,
    LinearQAT,
)
from amct_pytorch.record.record_file import read_record


class Doubled(torch.autograd.Function):
    """A user's own function, which the quantizers must not disturb."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 2


@torch.library.custom_op("amct_test::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


halved.register_fake(torch.empty_like)
halved.register_autograd(lambda ctx, grad: grad / 2)


class Every(nn.Module):
    """Every operator, groups among them, float layers, and a function of the user's own."""

    def __init__(self, bits: str, algo: str) -> None:
        super().__init__()
        weights = {"dst_type": bits, "weights_retrain_algo": algo}
        config = {"retrain_data_config": {"dst_type": bits}, "retrain_weight_config": weights}
        off = {"retrain_enable": False}
        self.first = Conv2dQAT(3, 8, 3, padding=1, config=config)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = Conv2dQAT(8, 8, 3, groups=4, padding="same", bias=False, config=config)
        self.unquantized = Conv2dQAT(8, 8, 1, config=off)
        self.up = ConvTranspose2dQAT(8, 12, 3, 2, 1, 1, 4, config=config, output_padding=1)
        self.plain_up = ConvTranspose2dQAT(12, 6, 2, 2, config=config)
        self.deep = Conv3dQAT(1, 2, (1, 3, 3), config=config)
        self.line = Conv1dQAT(12, 6, 3, groups=2, config=config)
        self.line_up = ConvTranspose1dQAT(6, 4, 3, 2, config=config)
        self.head = nn.Sequential(LinearQAT(4, 6, config=config), nn.ReLU())
        self.last = LinearQAT(18, 7, config=config)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.unquantized(Doubled.apply(self.grouped(x)))
        x = self.plain_up(torch.relu(self.up(x)))
        x = self.deep(x.unsqueeze(1)).flatten(1, 2).flatten(2)[..., :40]
        x = self.line_up(torch.relu(self.line(x)))
        return self.last(self.head(x.transpose(1, 2)[:, 5:8]).flatten(1))


QUANTIZED = ["first", "grouped", "up", "plain_up", "deep", "line", "line_up", "head.0", "last"]


def trained(model: nn.Module, shape: tuple[int, ...], steps: int = 3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model.eval(), x


def exported(model: nn.Module, x: Tensor, file: Path, **options: object) -> Path:
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False, external_data=False, **options)
    return file


def run(file: Path, x: Tensor, setting: str = "disable_quant_qdq") -> np.ndarray:
    """In float unless said otherwise: int8 kernels of x86 without VNNI saturate."""
    options = ort.SessionOptions()
    options.add_session_config_entry(f"session.{setting}", "1")
    session = ort.InferenceSession(file, options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.fixture(scope="module", params=[("INT8", "arq_retrain"), ("INT4", "ulq_retrain")], ids=str)
def case(request, tmp_path_factory):
    bits, algo = request.param
    torch.manual_seed(1)
    model, x = trained(Every(bits, algo), (2, 3, 8, 8))
    batch = torch.export.Dim("batch")
    # Without its optimizer, the exporter computes shapes in the graph, and shares no constants.
    optimize = bits == "INT8"
    file = exported(
        model,
        x,
        tmp_path_factory.mktemp("qat") / "net.onnx",
        dynamic_shapes=({0: batch},),
        opset_version=18,
        optimize=optimize,
    )
    return bits, model, x, file


def test_the_exported_file_is_standard_qdq(case):
    bits, model, _, file = case
    written = onnx.load(file)
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 18)]
    assert not written.functions
    count = [node.op_type for node in written.graph.node].count
    assert count("QuantizeLinear") == len(QUANTIZED)
    assert count("DequantizeLinear") == 2 * len(QUANTIZED)
    assert count("Clip") == (len(QUANTIZED) if bits == "INT4" else 0)
    tensors = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
    weights = [
        n for n in written.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors
    ]
    found = {}
    for node in weights:
        scopes = next(p.value for p in node.metadata_props if p.key.endswith("name_scopes"))
        axis = next((a.i for a in node.attribute if a.name == "axis"), None)
        codes, scale = tensors[node.input[0]], tensors[node.input[1]]
        assert codes.dtype == np.int8
        assert axis is None or scale.shape == (codes.shape[axis],)
        found[scopes.split("'")[-4]] = axis, scale
    axes = {name: axis for name, (axis, _) in found.items()}
    assert axes == dict(zip(QUANTIZED, (0, 0, 1, 1, 0, 0, 1, None, None), strict=True))
    for name, (_, scale) in found.items():
        expected = np.float32(model.get_submodule(name).factors().scale_w)
        assert np.array_equal(scale.reshape(-1), expected)


def test_onnx_runtime_answers_as_torch_does(case):
    bits, model, x, file = case
    other = torch.randn(5, 3, 8, 8)
    for batch in (x, other):
        with torch.no_grad():
            y = model(batch).numpy()
        # QuantizeLinear divides where torch multiplies by the inverse, and convolutions add in
        # another order: a value next to a half may fall on its other side. At 4 bits such a
        # step is a sixteenth of a range, of few values.
        allowed = {"INT8": 0.01, "INT4": 0.1}[bits] * np.abs(y).max()
        np.testing.assert_allclose(run(file, batch), y, rtol=0, atol=allowed)
        if bits == "INT4":
            exact = run(file, batch, "x64quantprecision")
            np.testing.assert_allclose(exact, y, rtol=0, atol=allowed)


def test_converted_files_compute_the_same(case, tmp_path, capsys):
    bits, model, x, file = case
    amct.convert_qat_model(file, tmp_path / "net", tmp_path / "record.txt")
    assert f"{len(QUANTIZED)} of {len(QUANTIZED) + 1} layers quantized" in capsys.readouterr().out
    fake_quant = run(tmp_path / "net_fake_quant_model.onnx", x)
    deployed = amct.DeploySession(tmp_path / "net_deploy_model.onnx").run(None, {"x": x.numpy()})
    assert np.array_equal(fake_quant, deployed[0])
    # What is added is the rounding of biases.
    trained_file = run(file, x)
    allowed = {"INT8": 0.01, "INT4": 0.1}[bits] * np.abs(trained_file).max()
    assert np.abs(fake_quant - trained_file).max() < allowed

    factors = read_record(tmp_path / "record.txt").factors
    assert list(factors) == QUANTIZED
    for name in QUANTIZED:
        layer = model.get_submodule(name)
        expected = layer.factors()
        assert factors[name].scale_w == expected.scale_w
        assert (factors[name].scale_d, factors[name].offset_d) == (
            expected.scale_d,
            expected.offset_d,
        )
        assert factors[name].activation_bits == int(bits[3:])
        packs = (
            getattr(layer, "groups", 1) == 1
            and layer.weight.shape[not layer.KIND.transposed] % 2 == 0
        )
        assert factors[name].weight_bits == (4 if bits == "INT4" and packs else 8)
        deploy = onnx.load(tmp_path / "net_deploy_model.onnx")
        node = next(n for n in deploy.graph.node if n.name == name)
        stored = {t.name: t for t in deploy.graph.initializer}[node.input[1]]
        assert stored.data_type == TensorProto.INT8
        if factors[name].weight_bits == 8 and layer.KIND.name != "Linear":
            integers = layer.weight_quantizer.integers(layer.weight).numpy()
            assert np.array_equal(numpy_helper.to_array(stored), integers)
    ledger = json.loads((tmp_path / "net_ledger.json").read_text())
    by_name = {entry["name"]: entry for entry in ledger["layers"]}
    assert by_name["unquantized"]["reason"] == "its weight is not quantized"
    if bits == "INT4":
        assert "stored in 8" in by_name["grouped"]["notes"][0]


def test_a_custom_operator_beside_trains_as_before():
    model = nn.Sequential(Conv2dQAT(2, 3, 1), nn.ReLU(), nn.Flatten(), LinearQAT(12, 2))
    x = torch.randn(2, 2, 2, 2, requires_grad=True)
    model(x)
    y = model(halved(Doubled.apply(x)))
    y.sum().backward()
    expected = x.grad
    x.grad = None
    model(x).sum().backward()
    assert torch.equal(expected, x.grad)


def test_exporting_before_the_ranges_are_known_is_told(tmp_path):
    with pytest.raises(Exception) as caught:
        exported(nn.Sequential(LinearQAT(2, 3)), torch.zeros(1, 2), tmp_path / "net.onnx")
    causes, error = [], caught.value
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    assert any(isinstance(cause, CalibrationError) for cause in causes)


def test_weights_quantized_in_the_file_and_u8_codes_of_other_tools(tmp_path):
    """Float weights behind QuantizeLinear, u8 inputs, an int32 bias."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 3, 1, 1)).astype(np.float32)
    scale = (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32)
    values = {
        "w": weight,
        "ws": scale,
        "wz": np.zeros(4, np.int8),
        "b": generator.integers(-99, 99, 4).astype(np.int32),
        "bs": scale * np.float32(0.02),
        "bz": np.zeros(4, np.int32),
        "s": np.float32(0.02),
        "z": np.uint8(100),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        helper.make_node("Conv", ["d", "wd", "bd"], ["first"], name="conv"),
        helper.make_node("Conv", ["d", "wd"], ["second"], name="other"),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ]
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 5, 5])
        for name, channels in (("x", 3), ("y", 4))
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "other.onnx")
    amct.convert_qat_model(tmp_path / "other.onnx", tmp_path / "net", tmp_path / "r.txt")
    x = torch.from_numpy(generator.normal(size=(1, 3, 5, 5)).astype(np.float32))
    expected = run(tmp_path / "other.onnx", x)
    np.testing.assert_allclose(
        run(tmp_path / "net_fake_quant_model.onnx", x), expected, rtol=1e-5, atol=1e-5
    )
    deployed = amct.DeploySession(tmp_path / "net_deploy_model.onnx").run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(deployed, expected, rtol=1e-5, atol=1e-5)
    factors = read_record(tmp_path / "r.txt").factors
    assert list(factors) == ["conv", "other"]
    assert factors["conv"].offset_d == 100 - 128


def test_a_bias_too_large_for_dead_weights_is_deployed(tmp_path):
    model = nn.Sequential(Conv2dQAT(2, 2, 1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 50.0
    x = torch.randn(1, 2, 4, 4) * 0.001
    model(x)
    file = exported(model.eval(), x, tmp_path / "net.onnx")
    amct.convert_qat_model(file, tmp_path / "net")
    ledger = json.loads((tmp_path / "net_ledger.json").read_text())
    assert "for the bias to fit into int32" in ledger["layers"][0]["notes"][0]
    found = run(tmp_path / "net_fake_quant_model.onnx", x)
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-6, atol=1e-5)


def test_bad_files_are_told_and_nothing_is_written(tmp_path):
    plain = exported(nn.Sequential(nn.Linear(2, 3)), torch.zeros(1, 2), tmp_path / "plain.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    target = tmp_path / "out" / "net"
    with pytest.raises(ExportError, match="whose input and weight come from DequantizeLinear"):
        amct.convert_qat_model(plain, target)
    with pytest.raises(ExportError, match="not a readable ONNX model"):
        amct.convert_qat_model(tmp_path / "text.onnx", target)
    with pytest.raises(FileMissingError, match="there is no file"):
        amct.convert_qat_model(tmp_path / "none.onnx", target)
    with pytest.raises(ArgumentValueError):
        amct.convert_qat_model(plain, target, record_file=plain)
    with pytest.raises(ArgumentTypeError, match=r"is a Linear, a module; .* torch\.onnx\.export"):
        amct.convert_qat_model(nn.Linear(2, 3), target)
    assert not (tmp_path / "out").exists()


def test_an_operator_whose_range_is_not_known_is_not_exported(tmp_path: Path) -> None:
    model = nn.Sequential(Conv2dQAT(2, 3, 3, config={"retrain_data_config": {"batch_num": 2}}))
    x = torch.randn(1, 2, 6, 6)
    model(x)
    file = tmp_path / "net.onnx"
    with pytest.raises(Exception, match="1 of batch_num 2 training batches have run") as told:
        torch.onnx.export(model.eval(), (x,), file, dynamo=True, verbose=False)
    assert isinstance(told.value.__cause__, CalibrationError)
    assert not file.exists()


@pytest.mark.parametrize("optimize", [True, False])
def test_operators_without_bias_before_a_batch_norm(tmp_path: Path, optimize: bool) -> None:
    model = nn.Sequential(
        Conv2dQAT(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        ConvTranspose2dQAT(4, 3, 2, 2, bias=False),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        LinearQAT(3 * 144, 5, bias=False),
    )
    x = torch.randn(2, 2, 8, 8)
    model(x)
    with torch.no_grad():
        expected = model.eval()(x).numpy()
    options = {"dynamo": True, "verbose": False, "opset_version": 18, "optimize": optimize}
    torch.onnx.export(model, (x,), tmp_path / "net.onnx", input_names=["x"], **options)
    amct.convert_qat_model(tmp_path / "net.onnx", tmp_path / "out")
    fake = ort.InferenceSession(tmp_path / "out_fake_quant_model.onnx")
    deployed = amct.DeploySession(tmp_path / "out_deploy_model.onnx")
    for session in (fake, deployed):
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, atol=0.02)
