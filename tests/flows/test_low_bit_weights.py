"""Weights of 4, 6 and 7 bits, and HFMG ranges, from the .cfg to the deployed integers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from topologies.networks import trained_like
from topologies.test_topologies import check_same_integers, sqnr
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.record.record_file import read_record


class Net(nn.Module):
    """Every operator with weights: convolutions, transposed, depthwise, Gemm and MatMul."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.conv = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 10, 3, stride=2)
        self.tokens, self.head = nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.bn(self.stem(x)))))
        x = torch.relu(self.conv(torch.relu(self.up(x))))
        x = torch.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(cfg: str) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """The whole flow; float and simulated output, and the feeds of a batch not calibrated on."""
    torch.manual_seed(3)
    batches = [(torch.randn(4, 3, 12, 12),) for _ in range(3)]
    model = trained_like(Net(), batches[0])
    Path("quant.cfg").write_text(cfg)
    amct.create_quant_config("config.json", model, batches[0], config_defination="quant.cfg")
    calibration = amct.quantize_model(
        "config.json", "m.onnx", "record.txt", model, batches[0], input_names=["x"]
    )
    with torch.no_grad():
        for batch in batches[:2]:
            calibration(*batch)
        simulated, want = calibration(*batches[2]), model(*batches[2])
    amct.save_model("m.onnx", "record.txt", "out/net")
    return want, simulated, {"x": batches[2][0].numpy()}


def ledger() -> dict[str, dict]:
    document = json.loads(Path("out/net_ledger.json").read_text())
    return {entry["name"]: entry for entry in document["layers"]}


@pytest.mark.parametrize(("bits", "db"), [(4, 8), (6, 20), (7, 25)])
def test_low_bit_weights_are_simulated_faked_and_deployed_alike(bits: int, db: float) -> None:
    want, simulated, feeds = run(
        f"batch_num: 2 common_config {{ arq_quantize {{ quant_bits: {bits} }} }}"
    )
    fake = onnx.load("out/net_fake_quant_model.onnx")
    session = amct.DeploySession("out/net_deploy_model.onnx")
    check_same_integers(fake, session, feeds)
    [deployed] = session.run(None, feeds)
    # The same integers; torch rounds float operators differently and flips a few.
    assert sqnr(simulated.numpy(), deployed) > 40
    assert sqnr(want.numpy(), deployed) > db

    factors = read_record("record.txt").factors
    expected = {
        4: {"stem": 8, "depthwise": 8, "up": 4, "conv": 4, "tokens": 4, "head": 4},
        6: {"stem": 6, "depthwise": 6, "up": 8, "conv": 6, "tokens": 8, "head": 8},
        7: {"stem": 7, "depthwise": 7, "up": 8, "conv": 7, "tokens": 8, "head": 8},
    }[bits]
    assert {name: f.weight_bits for name, f in factors.items()} == expected
    model = onnx.load("out/net_deploy_model.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    if bits == 4:
        # Two in a byte along the input channels.
        assert weights["up.weight"].shape == (4, 6, 2, 2)
        assert weights["conv.weight"].shape == (10, 3, 3, 3)
        assert weights["tokens.weight"].shape == (5, 12)
        assert weights["head.weight"].shape == (6, 5)
        assert weights["stem.weight"].shape == (8, 3, 3, 3)
        notes = {name: entry["notes"] for name, entry in ledger().items()}
        assert "weights get 8 bits, not 4: it has 8 groups" in notes["depthwise"]
        assert any("odd number" in note for note in notes["stem"])
        assert not any("not 4" in note for note in notes["conv"])
    else:
        assert np.abs(weights["conv.weight"].astype(int)).max() in (
            2 ** (bits - 1) - 1,
            2 ** (bits - 1),
        )
        assert weights["conv.weight"].shape == (10, 6, 3, 3)


@pytest.mark.parametrize("bits", [4, 6])
def test_low_bit_weights_run_in_the_portable_model(bits: int) -> None:
    _, __, feeds = run(f"common_config {{ arq_quantize {{ quant_bits: {bits} }} }}")
    amct.deploy_to_qdq("out/net_deploy_model.onnx", "qdq.onnx")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    [portable] = ort.InferenceSession("qdq.onnx", options).run(None, feeds)
    [deployed] = amct.DeploySession("out/net_deploy_model.onnx").run(None, feeds)
    # Steps of 8-bit activations at other roundings; a wrong weight costs far more.
    assert sqnr(deployed, portable) > 20


def test_packed_weights_are_in_the_record_that_names_them() -> None:
    run("common_config { arq_quantize { quant_bits: 4 } }")
    text = Path("record.txt").read_text()
    assert text.count('wts_type: "INT4"') == 4
    # Asking for four bits where they cannot be packed is refused, with a way out.
    Path("record.txt").write_text(text.replace('wts_type: "INT8"', 'wts_type: "INT4"'))
    with pytest.raises(amct.AmctError, match=r"'stem'.*cannot be packed.*INT8"):
        amct.save_model("m.onnx", "record.txt", "out/other")
    assert not Path("out/other_deploy_model.onnx").exists()


@pytest.mark.parametrize("offset", ["true", "false"])
def test_hfmg_ranges_keep_the_accuracy(offset: str) -> None:
    block = "hfmg_quantize { num_of_bins: 2048 }"
    want, _, feeds = run(f"activation_offset: {offset} common_config {{ {block} }}")
    params = json.loads(Path("config.json").read_text())["conv"]["activation_quant_params"]
    assert (params["act_algo"], params["num_of_bins"]) == ("hfmg", 2048)
    found = read_record("record.txt").factors
    assert any(f.offset_d for f in found.values()) == (offset == "true")
    [deployed] = amct.DeploySession("out/net_deploy_model.onnx").run(None, feeds)
    assert sqnr(want.numpy(), deployed) > 22
