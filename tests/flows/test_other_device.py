"""A model on a device other than the CPU, one without float64, is calibrated where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from flows.other_device import DEVICE, There, WithDevice, moved
from topologies.networks import TOPOLOGIES, trained_like
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.observers.histogram import Histogram


def calibrated(model: nn.Module, x: Tensor, prefix: str) -> Tensor:
    """Writes the files of the flow; returns the simulated output."""
    amct.create_quant_config("config.json", model, x)
    calibration = amct.quantize_model(
        "config.json", f"{prefix}.onnx", f"{prefix}.txt", model, x, ["x"], ["y"]
    )
    with torch.no_grad():
        calibration(x)
        result: Tensor = calibration(x)
    amct.save_model(f"{prefix}.onnx", f"{prefix}.txt", prefix)
    return result


def test_devices_do_not_mix() -> None:
    with WithDevice():
        there = There(torch.ones(3))
        assert (there + 1).device == torch.zeros(2, device=DEVICE).device == DEVICE
        with pytest.raises(RuntimeError, match="tensors on"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="no float64"):
            there.double() * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["residual", "average pools"])
def test_the_flow_on_another_device(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.randn(TOPOLOGIES[name].shapes[0])
    model, x = trained_like(TOPOLOGIES[name].build(), (x,)).to(dtype), x.to(dtype)
    here = calibrated(model, x, "here")
    with WithDevice():
        there = calibrated(moved(model), There(x), "there")
        assert there.device == DEVICE
        assert all(tensor.device == DEVICE for tensor in model.state_dict().values())
    # The same operators on the same values: the device makes no difference at all.
    assert isinstance(there, There)
    assert torch.equal(there.held, here)
    assert Path("there.txt").read_text() == Path("here.txt").read_text()
    found = [
        ort.InferenceSession(f"{prefix}_fake_quant_model.onnx").run(None, {"x": x.numpy()})[0]
        for prefix in ("here", "there")
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("largest", [1.0, 1e12])
def test_values_are_counted_where_they_are(largest: float) -> None:
    x = torch.randn(5000) * largest
    here, there = Histogram(), Histogram()
    here.update(x)
    with WithDevice():
        there.update(There(x))
    assert torch.equal(here.counts, there.counts)
    assert there.kth_largest(1) == float(x.max())
