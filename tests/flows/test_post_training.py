"""What the calls of post-training quantization promise, on a small network."""

from __future__ import annotations

import copy
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from topologies.networks import Chain, trained_like
from torch import nn

import amct_pytorch as amct
from amct_pytorch.record.record_file import read_record

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(5)
    return trained_like(Chain(), (X,))


def calibrated(model: nn.Module, batch_num: int = 1, **options: object) -> nn.Module:
    amct.create_quant_config("config.json", model, X, batch_num=batch_num)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, X, **options)
    for _ in range(batch_num):
        quantized(X)
    return quantized


def bytes_of(*names: str) -> list[bytes]:
    return [Path(name).read_bytes() for name in names]


def test_runs_are_reproducible_and_leave_random_state_alone(model: nn.Module) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    calibrated(model)
    amct.save_model("m.onnx", "record.txt", "out/a")
    first = bytes_of("record.txt", "out/a_deploy_model.onnx", "out/a_fake_quant_model.onnx")
    calibrated(model)
    amct.save_model("m.onnx", "record.txt", "out/a")
    again = bytes_of("record.txt", "out/a_deploy_model.onnx", "out/a_fake_quant_model.onnx")
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)


def test_factors_do_not_depend_on_how_the_data_is_split(model: nn.Module) -> None:
    calibrated(model)
    whole = read_record("record.txt").factors
    amct.create_quant_config("config.json", model, X, batch_num=4)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    for part in X.split(1):
        quantized(part)
    parts = read_record("record.txt").factors
    assert parts["body.0.0"] == whole["body.0.0"]
    for name, factors in parts.items():
        # Behind the first layer, the float network itself rounds by the size of the batch.
        assert factors.scale_w == whole[name].scale_w
        assert factors.offset_d == whole[name].offset_d
        assert factors.scale_d == pytest.approx(whole[name].scale_d, rel=1e-4)


def test_further_passes_change_no_file(model: nn.Module) -> None:
    quantized = calibrated(model)
    before = bytes_of("record.txt", "m.onnx")
    quantized(X * 5)
    quantized(X)
    assert bytes_of("record.txt", "m.onnx") == before


def test_float_until_the_last_batch_then_quantized(model: nn.Module) -> None:
    amct.create_quant_config("config.json", model, X, batch_num=2)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    with torch.no_grad():
        expected = model(X)
        for _ in range(2):
            torch.testing.assert_close(quantized(X), expected, rtol=1e-4, atol=1e-5)
        difference = (quantized(X) - expected).abs().max()
    assert 0 < difference < 0.05 * expected.abs().max()


def test_calibration_may_run_in_any_gradient_mode(model: nn.Module) -> None:
    amct.create_quant_config("config.json", model, X, batch_num=3)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    with torch.inference_mode():
        quantized(X)
    quantized(X)
    with torch.no_grad():
        quantized(X)
        simulated = quantized(X)
    assert read_record("record.txt").factors["head"].complete
    with torch.inference_mode():
        assert torch.equal(quantized(X), simulated)


def test_the_caller_keeps_mode_hooks_and_buffers(model: nn.Module) -> None:
    model.train()
    handle = model.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    calibrated(model)
    assert all(module.training for module in model.modules())
    assert len(model._forward_hooks) == 1
    assert not model._forward_pre_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    handle.remove()


def test_a_model_in_training_mode_is_told(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        amct.create_quant_config("eval.json", model.eval(), X)
        assert "training mode" not in caplog.text
        amct.create_quant_config("train.json", model.train(), X)
    assert caplog.text.count("the model is in training mode") == 1
    assert Path("eval.json").read_text() == Path("train.json").read_text()


def test_bias_correction_lowers_the_error(model: nn.Module) -> None:
    calibrated(model)
    amct.save_model("m.onnx", "record.txt", "out/with")
    config = json.loads(Path("config.json").read_text())
    config["bias_correction"] = False
    Path("config.json").write_text(json.dumps(config))
    amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)(X)
    amct.save_model("m.onnx", "record.txt", "out/without")
    corrected, plain = (
        json.loads(Path(f"out/{name}_ledger.json").read_text()) for name in ("with", "without")
    )
    assert any(layer["bias_corrected"] for layer in corrected["layers"])
    assert not any(layer["bias_corrected"] for layer in plain["layers"])
    assert corrected["output"]["sqnr_db"] > plain["output"]["sqnr_db"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_cfg_file_decides(model: nn.Module, symmetric: bool) -> None:
    Path("a.cfg").write_text(
        f"""
        batch_num: 1
        activation_offset: {str(not symmetric).lower()}
        skip_layers: "head"
        common_config {{
            arq_quantize {{ channel_wise: false }}
            ifmr_quantize {{ search_step: 0.1 }}
        }}
        override_layer_configs {{
            layer_name: "body.0.0"
            calibration_config {{ arq_quantize {{ channel_wise: true }} }}
        }}
        """
    )
    amct.create_quant_config("config.json", model, X, config_definition="a.cfg")
    amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)(X)
    factors = read_record("record.txt").factors
    assert list(factors) == ["body.0.0", "body.2.0"]
    assert [len(layer.scale_w) for layer in factors.values()] == [8, 1]
    # The input of the second layer is behind a ReLU: only an offset makes use of that.
    assert (factors["body.2.0"].offset_d == 0) is symmetric


def test_fusion_can_be_switched_off(model: nn.Module) -> None:
    amct.create_quant_config("config.json", model, X)
    config = json.loads(Path("config.json").read_text())
    config["skip_fusion_layers"] = ["body.0.0"]
    Path("config.json").write_text(json.dumps(config))
    amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)(X)
    amct.save_model("m.onnx", "record.txt", "out/net")
    types = [node.op_type for node in onnx.load("out/net_deploy_model.onnx").graph.node]
    assert types.count("BatchNormalization") == 1
    factors = read_record("record.txt").factors
    assert factors["body.0.0"].skip_fusion
    assert not factors["body.2.0"].skip_fusion


def test_dynamic_batch_and_names(model: nn.Module) -> None:
    calibrated(
        model,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    amct.save_model("m.onnx", "record.txt", "out/net")
    feeds = {"image": X[:3].numpy()}
    fake = ort.InferenceSession("out/net_fake_quant_model.onnx").run(["logits"], feeds)[0]
    deploy = amct.DeploySession("out/net_deploy_model.onnx").run(["logits"], feeds)[0]
    assert fake.shape == (3, 10)
    assert abs(fake - deploy).max() < 1e-5


def test_files_may_be_moved_together(model: nn.Module) -> None:
    calibrated(model)
    Path("elsewhere").mkdir()
    for name in ("m.onnx", "record.txt"):
        Path(name).rename(Path("elsewhere") / name)
    amct.save_model("elsewhere/m.onnx", "elsewhere/record.txt", "out/")
    assert {p.name for p in Path("out").iterdir()} == {
        "fake_quant_model.onnx",
        "deploy_model.onnx",
        "ledger.json",
    }


def test_edited_record_is_used_and_said(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    calibrated(model)
    before, head = Path("record.txt").read_text().split('key: "head"')
    head = re.sub(r"scale_d: \S+", "scale_d: 0.5", head)
    Path("record.txt").write_text(before + 'key: "head"' + head)
    assert read_record("record.txt").factors["head"].scale_d == 0.5
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        amct.save_model("m.onnx", "record.txt", "out/net")
    assert "not those the ONNX model was calibrated with" in caplog.text
    deploy = onnx.load("out/net_deploy_model.onnx")
    quant = next(node for node in deploy.graph.node if node.name == "head.quant")
    assert {a.name: a.f for a in quant.attribute}["scale"] == 2.0


def test_poor_agreement_is_shouted(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    amct.create_quant_config("config.json", model, X)
    config = json.loads(Path("config.json").read_text())
    # Clips each input to a fiftieth of its range.
    config["body.2.0"]["activation_quant_params"] |= {
        "search_range": [0.01, 0.02],
        "search_step": 0.01,
    }
    Path("config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)(X)
    assert "POOR AGREEMENT" in caplog.text
    assert "body.2.0" in caplog.text


class Stateful(nn.Module):
    """Counts its forwards in a buffer and in an attribute, and answers by both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("runs", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        self.calls += 1
        return self.conv(x) * (self.runs + self.calls)


def test_model_with_state_is_calibrated_from_the_state_it_was_given_in() -> None:
    torch.manual_seed(0)
    model = Stateful().eval()
    amct.create_quant_config("config.json", model, X, batch_num=2)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    assert float(quantized.runs) == quantized.calls == 0
    with torch.no_grad():
        for batch in range(1, 3):
            expected = model.conv(X) * 2 * batch
            torch.testing.assert_close(quantized(X), expected, rtol=1e-5, atol=1e-5)
    # The last batch ran a second time, to measure the layers; the buffer does not show it.
    assert float(quantized.runs) == 2


class Auxiliary(nn.Module):
    """An auxiliary head that runs always and is returned in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(x))
        out, aux = self.head(x), self.aux(x)
        return (out, aux) if self.training else out


def test_layer_whose_output_is_not_used_stays_float() -> None:
    model = Auxiliary()
    calibrated(model)
    amct.save_model("m.onnx", "record.txt", "out/net")
    layers = json.loads(Path("out/net_ledger.json").read_text())["layers"]
    statuses = {layer["name"]: layer["status"] for layer in layers}
    assert statuses == {"stem": "quantized", "head": "quantized", "aux": "float"}
    assert "not used" in next(layer["reason"] for layer in layers if layer["name"] == "aux")


def test_fp16_mode_is_simulated_as_it_is_deployed(model: nn.Module) -> None:
    Path("a.cfg").write_text("fakequant_precision_mode: FORCE_FP16_QUANT")
    amct.create_quant_config("config.json", model, X, config_definition="a.cfg")
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    quantized(X)
    amct.save_model("m.onnx", "record.txt", "out/net")
    session = ort.InferenceSession("out/net_fake_quant_model.onnx")
    fake = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    with torch.no_grad():
        simulated = quantized(X)
    scale = read_record("record.txt").factors["head"].scale_d
    assert scale == float(torch.tensor(scale).half())
    # The same integers: only the mean before the last layer may round differently.
    assert float((simulated - torch.from_numpy(fake)).abs().max()) < 1e-5


def test_autocast_of_the_caller_does_not_reach_the_files(model: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        amct.create_quant_config("config.json", model, X)
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    quantized(X)
    amct.save_model("m.onnx", "record.txt", "out/net")
    types = {tensor.data_type for tensor in onnx.load("m.onnx").graph.initializer}
    assert onnx.TensorProto.BFLOAT16 not in types


def test_weights_of_other_modules_are_in_the_ledger() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.ConvTranspose1d(4, 4, 4, 4), nn.BatchNorm1d(4)
    ).eval()
    calibrated(net)
    amct.save_model("m.onnx", "record.txt", "out/net")
    conv, transposed = json.loads(Path("out/net_ledger.json").read_text())["layers"]
    assert (conv["name"], conv["status"]) == ("0", "quantized")
    assert (transposed["name"], transposed["status"]) == ("2", "float")
    assert transposed["reason"] == "ConvTranspose1d is not supported in this version"
    assert transposed["parameters"] == 64


def test_sums_beyond_float32_are_noted() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(768, 4)).eval()
    with torch.no_grad():
        model[2].weight.uniform_(0.5, 1.0)
    calibrated(model)
    amct.save_model("m.onnx", "record.txt", "out/net")
    (entry,) = json.loads(Path("out/net_ledger.json").read_text())["layers"]
    assert any("2^24" in note for note in entry["notes"])


def test_matmul_weights_keep_their_names(model: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.randn(2, 5, 8)
    amct.create_quant_config("config.json", net, x)
    amct.quantize_model("config.json", "m.onnx", "record.txt", net, x)(x)
    amct.save_model("m.onnx", "record.txt", "out/net")
    deploy = onnx.load("out/net_deploy_model.onnx").graph
    int8 = {t.name for t in deploy.initializer if t.data_type == onnx.TensorProto.INT8}
    assert int8 == {"0.weight", "2.weight"}


def test_existing_files_are_named_when_overwritten(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        calibrated(model)
        assert "overwrote" not in caplog.text
        calibrated(model)
    for name in ("config.json", "m.onnx", "record.txt"):
        assert sum(name in line for line in caplog.text.splitlines()) == 1


def test_import_is_light() -> None:
    code = (
        "import sys, amct_pytorch; "
        "print([m for m in ('onnx', 'onnxruntime', 'onnxscript', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
