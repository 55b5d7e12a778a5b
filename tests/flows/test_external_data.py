"""Models too large for one file: the flow with every weight in a data file of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ort_sessions import cpu_session
from torch import nn

import amct_pytorch as amct
from amct_pytorch.export import onnx_file

X = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 40), nn.Linear(40, 4))


def calibrated(net: nn.Module, folder: str, prefix: str = "m") -> np.ndarray:
    """Writes the two files of a calibration; returns the simulated output on X."""
    amct.create_quant_config(f"{folder}/{prefix}.json", net, X)
    calibration = amct.quantize_model(
        f"{folder}/{prefix}.json", f"{folder}/{prefix}.onnx", f"{folder}/{prefix}.txt", net, X
    )
    with torch.no_grad():
        calibration(X)
        result: np.ndarray = calibration(X).numpy()
    return result


def ran(path: str) -> np.ndarray:
    session = cpu_session(path)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


def deployed(path: str) -> np.ndarray:
    session = amct.DeploySession(path)
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


def test_the_files_go_on_working_together_in_another_folder() -> None:
    expected = calibrated(model(0), "first")
    assert Path("first/m_0.weight.external").exists()
    shutil.copytree("first", "elsewhere")
    shutil.rmtree("first")
    amct.save_model("elsewhere/m.onnx", "elsewhere/m.txt", "out/net")
    assert {path.name for path in Path("out").glob("*.external")} == {
        f"{layer}.weight_{kind}.external"
        for layer, kind in (
            ("0", "fakequant"),
            ("2", "fakequant"),
            ("0", "deploy"),
            ("2", "deploy"),
        )
    }
    sizes = json.loads(Path("out/net_ledger.json").read_text())["bytes"]
    weights = (20 * 64 + 64 * 40 + 40 * 4) * 4
    assert sizes["float"] > weights
    assert sizes["fake-quant"] > weights
    assert weights / 4 < sizes["deploy"] < sizes["float"]
    Path("out").rename("moved")
    fake = ran("moved/net_fake_quant_model.onnx")
    np.testing.assert_array_equal(fake, deployed("moved/net_deploy_model.onnx"))
    # No rounding between these layers differs from torch's, but for the order of its sums.
    np.testing.assert_allclose(fake, expected, rtol=1e-5, atol=1e-6)
    amct.deploy_to_qdq("moved/net_deploy_model.onnx", "qdq/net.onnx")
    assert list(Path("qdq").glob("net_*.external"))
    np.testing.assert_allclose(ran("qdq/net.onnx"), fake, rtol=0, atol=float(abs(fake).max()) / 64)


def test_two_models_in_one_folder_keep_their_own_weights() -> None:
    expected = [calibrated(model(i), "both", f"m{i}") for i in range(2)]
    for i in range(2):
        amct.save_model(f"both/m{i}.onnx", f"both/m{i}.txt", f"both/net{i}")
    for i in range(2):
        fake = ran(f"both/net{i}_fake_quant_model.onnx")
        np.testing.assert_allclose(fake, expected[i], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(fake, deployed(f"both/net{i}_deploy_model.onnx"))
    assert Path("both/0.weight_1_deploy.external").exists()


def test_a_second_run_writes_over_the_files_of_the_first() -> None:
    for seed in (0, 1):
        expected = calibrated(model(seed), "same")
        amct.save_model("same/m.onnx", "same/m.txt", "same/net")
        names = sorted(path.name for path in Path("same").glob("*.external"))
        assert len(names) == 6
        assert not any("_1" in name for name in names)
    np.testing.assert_allclose(
        ran("same/net_fake_quant_model.onnx"), expected, rtol=1e-5, atol=1e-6
    )
    locations = {
        entry.value
        for tensor in onnx.load("same/m.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"m_0.weight.external", "m_2.weight.external"}
