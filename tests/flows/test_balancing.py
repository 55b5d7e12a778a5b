"""quantize_preprocess, and quantize_model with its factors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from ort_sessions import cpu_session
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.record.record_file import read_record


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


LAYERS = {
    "Linear": (lambda: nn.Linear(8, 6), (4, 8), 1),
    "Linear 3-D": (lambda: nn.Linear(8, 6), (4, 5, 8), 2),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 7), 1),
    "Conv2d grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 7, 7), 1),
    "Conv2d depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 7, 7), 1),
    "Conv3d": (lambda: nn.Conv3d(8, 4, 2), (2, 8, 4, 5, 5), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), (2, 8, 5, 5), 1),
}


class Net(nn.Module):
    """One layer, whose input channels differ in size by a factor of 100."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer = layer
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return torch.tanh(self.layer(x * torch.logspace(-1, 1, 8).view(shape)))


def config(model: nn.Module, x: Tensor, strength: float | None) -> None:
    amct.create_quant_config("config.json", model, x)
    document = json.loads(Path("config.json").read_text())
    for value in document.values():
        if isinstance(value, dict) and strength is not None:
            value["dmq_balancer_param"] = strength
    Path("config.json").write_text(json.dumps(document))


def error(model: nn.Module, quantized: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((quantized(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_balanced_layers_are_the_same_in_float_and_run_as_deployed(name: str) -> None:
    build, shape, axis = LAYERS[name]
    torch.manual_seed(1)
    model, x = Net(build(), axis).eval(), torch.randn(shape)
    config(model, x, 0.5)
    watched = amct.quantize_preprocess("config.json", "record.txt", model, x)
    with torch.no_grad():
        assert torch.equal(watched(x), model(x))
    factors = read_record("record.txt").factors["layer"].balance
    assert len(factors) == 8
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
    with torch.no_grad():
        # The first pass is in float, balanced: equal but for the rounding of float32.
        torch.testing.assert_close(quantized(x), model(x), rtol=1e-4, atol=1e-5)
    assert error(model, quantized, x) < 0.03
    assert read_record("record.txt").factors["layer"].balance == factors

    amct.save_model("m.onnx", "record.txt", "net")
    modified = ort.InferenceSession("m.onnx")
    feeds = {modified.get_inputs()[0].name: x.numpy()}
    with torch.no_grad():
        wanted = model(x).numpy()
        simulated = quantized(x).numpy()
    assert np.allclose(modified.run(None, feeds)[0], wanted, atol=2e-2)
    fake = ort.InferenceSession("net_fake_quant_model.onnx").run(None, feeds)[0]
    assert np.allclose(fake, simulated, atol=1e-5)
    deploy = amct.DeploySession("net_deploy_model.onnx").run(None, feeds)[0]
    assert np.allclose(deploy, fake, atol=1e-6)
    amct.deploy_to_qdq("net_deploy_model.onnx", "net_qdq.onnx")
    portable = cpu_session("net_qdq.onnx").run(None, feeds)[0]
    # It quantizes the tanh's input or output as well, with one range for all channels.
    assert np.linalg.norm(portable - wanted) < 0.1 * np.linalg.norm(wanted)


def test_the_deploy_model_multiplies_by_the_inverse_under_its_documented_name() -> None:
    import onnx
    from onnx import numpy_helper

    build, shape, axis = LAYERS["Conv2d"]
    torch.manual_seed(1)
    model, x = Net(build(), axis).eval(), torch.randn(shape)
    config(model, x, 0.5)
    amct.quantize_preprocess("config.json", "record.txt", model, x)(x)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
    quantized(x)
    amct.save_model("m.onnx", "record.txt", "net")
    deploy = onnx.load("net_deploy_model.onnx")
    held = {t.name: numpy_helper.to_array(t) for t in deploy.graph.initializer}
    constant = held["layer.tensor_balance_factor"]
    assert constant.shape == (1, 8, 1, 1)
    factors = np.asarray(read_record("record.txt").factors["layer"].balance, np.float32)
    assert np.array_equal(constant.flatten(), 1 / factors)
    quant = next(n for n in deploy.graph.node if n.op_type == "AscendQuant")
    before = next(n for n in deploy.graph.node if quant.input[0] in n.output)
    assert before.op_type == "Mul"
    assert "layer.tensor_balance_factor" in before.input


def test_an_outlier_channel_does_less_harm_when_balanced() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    x = torch.randn(64, 32)
    with torch.no_grad():
        x[:, 5] *= 50
        model[0].weight[:, 5] /= 50
    errors = {}
    for strength in (None, 0.5):
        config(model, x, strength)
        if strength is not None:
            amct.quantize_preprocess("config.json", "record.txt", model, x)(x)
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
        quantized(x)
        errors[strength] = error(model, quantized, x)
    assert errors[0.5] < 0.15 * errors[None]


def test_a_second_pass_gives_the_factors_of_both_batches() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    config(model, a, 0.5)
    both = amct.quantize_preprocess("config.json", "both.txt", model, a)
    both(a)
    both(b)
    at_once = amct.quantize_preprocess("config.json", "once.txt", model, a)
    at_once(torch.cat([a, b]))
    assert read_record("both.txt").factors == read_record("once.txt").factors


def test_balancing_goes_with_fused_norms_and_with_ada() -> None:
    torch.manual_seed(4)
    body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    x = torch.randn(4, 4, 9, 9)
    body(x)
    body.eval()
    config(body, x, 0.6)
    document = json.loads(Path("config.json").read_text())
    document["3"]["weight_quant_params"] = {
        "wts_algo": "ada_quantize",
        "num_bits": 8,
        "num_iteration": 10,
        "channel_wise": True,
    }
    Path("config.json").write_text(json.dumps(document))
    amct.quantize_preprocess("config.json", "record.txt", body, x)(x)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", body, x)
    quantized(x)
    assert error(body, quantized, x) < 0.02
    files_agree(quantized, x)
    ledger = json.loads(Path("net_ledger.json").read_text())
    assert all("balanced" in json.dumps(entry["notes"]) for entry in ledger["layers"])


def test_what_is_missing_is_told_before_anything_is_written() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(4, 8)
    config(model, x, None)
    with pytest.raises(amct.AmctError, match="no enabled layer has dmq_balancer_param"):
        amct.quantize_preprocess("config.json", "record.txt", model, x)
    config(model, x, 0.5)
    with pytest.raises(amct.AmctError, match=r"does not exist.*'0'.*quantize_preprocess"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
    Path("record.txt").write_text('record { key: "0" value { scale_w: 1 offset_w: 0 } }')
    with pytest.raises(amct.AmctError, match=r"'0' has dmq_balancer_param.*no tensor_balance"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
    Path("record.txt").write_text('record { key: "0" value { tensor_balance_factor: 1 } }')
    with pytest.raises(amct.AmctError, match=r"has 1 tensor_balance_factor.*8 input channels"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
    assert not Path("m.onnx").exists()


def test_nan_is_told_and_nothing_is_written() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(4, 8)
    config(model, x, 0.5)
    watched = amct.quantize_preprocess("config.json", "record.txt", model, x)
    with pytest.raises(amct.AmctError, match="'0' holds NaN"):
        watched(x * float("nan"))
    assert not Path("record.txt").exists()
    watched(x)
    assert len(read_record("record.txt").factors["0"].balance) == 8


def two_convs() -> tuple[nn.Module, Tensor]:
    """Channels between two convolutions that differ by a factor of 1000."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    spread = torch.logspace(-1.5, 1.5, 16)
    with torch.no_grad():
        model[0].weight.mul_(spread.view(-1, 1, 1, 1))
        model[0].bias.mul_(spread)
        model[2].weight.div_(spread.view(1, -1, 1, 1))
    return model, torch.randn(4, 3, 12, 12)


def files_agree(quantized: nn.Module, x: Tensor) -> None:
    amct.save_model("m.onnx", "record.txt", "net")
    session = amct.DeploySession("net_deploy_model.onnx")
    feeds = {session.get_inputs()[0].name: x.numpy()}
    with torch.no_grad():
        assert np.allclose(session.run(None, feeds)[0], quantized(x).numpy(), atol=1e-5)


def test_factors_go_into_the_layer_before_where_that_is_exact() -> None:
    import onnx

    model, x = two_convs()
    document_errors = {}
    for strength in (None, 0.5):
        config(model, x, strength)
        if strength is not None:
            amct.quantize_preprocess("config.json", "record.txt", model, x)(x)
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
        with torch.no_grad():
            torch.testing.assert_close(quantized(x), model(x), rtol=1e-3, atol=1e-4)
        document_errors[strength] = error(model, quantized, x)
    files_agree(quantized, x)
    deploy = onnx.load("net_deploy_model.onnx")
    # The first layer has nothing before it; the second needs no multiplication.
    assert sum(node.op_type == "Mul" for node in deploy.graph.node) == 1
    ledger = json.loads(Path("net_ledger.json").read_text())["layers"]
    assert "1 / factor is in the weights of 0" in json.dumps(ledger[1]["notes"])
    assert document_errors[0.5] < 0.5 * document_errors[None]


def test_equalization_is_asked_for_in_the_config_and_helps() -> None:
    model, x = two_convs()
    errors = {}
    for wanted in (False, True):
        config(model, x, None)
        document = json.loads(Path("config.json").read_text())
        assert "cross_layer_equalization" not in document
        document["cross_layer_equalization"] = wanted
        Path("config.json").write_text(json.dumps(document))
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
        with torch.no_grad():
            torch.testing.assert_close(quantized(x), model(x), rtol=1e-3, atol=1e-4)
        errors[wanted] = error(model, quantized, x)
    files_agree(quantized, x)
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("shape", [(16, 8), (4, 4, 8)])
def test_linear_layers_get_a_scale_for_each_channel_where_the_config_asks(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 12)).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 0, 12).view(-1, 1))
    errors = {}
    for wanted in (False, True):
        config(model, x, None)
        document = json.loads(Path("config.json").read_text())
        document["linear_channel_wise"] = wanted
        del document["0"]["weight_quant_params"]["channel_wise"]
        Path("config.json").write_text(json.dumps(document))
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
        quantized(x)
        with torch.no_grad():
            difference = (quantized(x) - model(x)).flatten(0, -2) / model(x).flatten(0, -2).std(0)
        errors[wanted] = float(difference.square().mean().sqrt())
        assert len(read_record("record.txt").factors["0"].scale_w) == (12 if wanted else 1)
    files_agree(quantized, x)
    amct.deploy_to_qdq("net_deploy_model.onnx", "net_qdq.onnx")
    session = cpu_session("net_qdq.onnx")
    portable = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.linalg.norm(portable - model(x).detach().numpy()) < 0.02 * np.linalg.norm(portable)
    assert errors[True] < 0.3 * errors[False]


def test_a_channel_wise_linear_without_the_key_is_still_refused() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(4, 8)
    config(model, x, None)
    document = json.loads(Path("config.json").read_text())
    document["0"]["weight_quant_params"]["channel_wise"] = True
    Path("config.json").write_text(json.dumps(document))
    with pytest.raises(amct.AmctError, match=r"0\.weight_quant_params\.channel_wise.*linear_chan"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
