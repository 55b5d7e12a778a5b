"""Structures through quantization-aware training: what evaluates is what is deployed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from flows.retraining_case import INT4, created, evaluated, run_files, saved, train
from topologies.networks import TOPOLOGIES, TRAINED_TOPOLOGIES, trained_like
from topologies.test_topologies import sqnr

from amct_pytorch.nn.retrain import retrain_layers
from amct_pytorch.record.record_file import read_record

# Layers that are trained.
STRUCTURES = {
    "residual": 4,
    "concat": 4,
    "depthwise, groups and dilation": 4,
    "conv and BN subclasses": 2,
    "two inputs, two outputs": 3,
    "control flow": 4,
    "reused and tied layers": 1,
    "attention": 6,
    "BN before conv": 3,
    "transposed convolutions": 4,
    "channels shut off by BN or by their weights": 2,
    "weight_norm and spectral_norm": 2,
    "TransformerEncoderLayer": 3,
    "average pools": 2,
    "1-D convolutions": 6,
}


FOUR_BITS = INT4 % "ulq_retrain"
IN_FOUR_BITS = (
    "residual",
    "depthwise, groups and dilation",
    "transposed convolutions",
    "1-D convolutions",
)


@pytest.mark.parametrize(
    ("name", "cfg"),
    [
        *(pytest.param(name, None, id=f"int8 {name}") for name in STRUCTURES),
        *(pytest.param(name, FOUR_BITS, id=f"int4 {name}") for name in IN_FOUR_BITS),
    ],
)
def test_what_evaluates_is_what_is_deployed(
    name: str, cfg: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    topology = {**TOPOLOGIES, **TRAINED_TOPOLOGIES}[name]
    torch.manual_seed(7)
    batches = [tuple(torch.randn(shape) for shape in topology.shapes) for _ in range(4)]
    model = trained_like(topology.build(), batches[0]).train()
    before = copy.deepcopy(model.state_dict())
    trained = created(model, batches[0], cfg)
    assert len(retrain_layers(trained)) == STRUCTURES[name]
    train(trained, batches)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the caller's model was changed"
    simulated = evaluated(trained, batches[1])
    record = read_record("record.txt")
    assert all(layer.complete for layer in record.factors.values())
    state = copy.deepcopy(trained.state_dict())
    ledger = saved(trained, batches[1])
    assert read_record("record.txt").factors == record.factors
    for key, value in trained.state_dict().items():
        assert torch.equal(value, state[key]), f"saving changed {key}"
    quantized = [entry for entry in ledger.values() if entry["status"] == "quantized"]
    assert len(quantized) == STRUCTURES[name]
    assert all(entry["reason"] for entry in ledger.values() if entry["status"] == "float")
    faked, deployed = run_files(batches[1])
    for sim, fake, deploy in zip(simulated, faked, deployed, strict=True):
        # The same integers and the same float operators around them: equal but for the last
        # bit of transcendental functions that two graphs may fuse differently.
        assert sqnr(fake, deploy) > 90
        # torch's float operators round differently from ONNX Runtime's, which flips single
        # integers at rounding boundaries, and those of four bits are large.
        assert sqnr(sim, fake) > (40 if cfg is None else 20)
        assert np.isfinite(fake).all()
