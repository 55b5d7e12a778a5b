"""Every supported structure through the whole flow: float, simulated, fake-quant, deployed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from topologies.networks import TOPOLOGIES, Topology, trained_like

import amct_pytorch as amct
from amct_pytorch.graph.tensors import tensors_in


def sqnr(original: np.ndarray, other: np.ndarray) -> float:
    noise = float(((original - other) ** 2).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float((original**2).sum()) / noise)


def exact_products() -> ort.SessionOptions:
    """ONNX Runtime's own fusions, without its saturating sums on x86 without VNNI."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def check_same_integers(
    fake: onnx.ModelProto, session: amct.DeploySession, feeds: dict[str, np.ndarray]
) -> None:
    """Every layer that gets the same integers in both models yields the same integers."""
    layers = session.layers
    pooled = {n.name for n in fake.graph.node if n.op_type == "AveragePool"}
    entering = [tensor for tensor, _ in layers.values()]
    # The mean that a pool yields is no integer; it is the same tensor in both models.
    leaving = [raw for _, raw in layers.values()]
    rounded = [
        raw if name in pooled else f"{name}.round.output0" for name, (_, raw) in layers.items()
    ]
    extended = onnx.ModelProto()
    extended.CopyFrom(fake)
    wanted = [*dict.fromkeys(entering), *rounded]
    known = {o.name for o in fake.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in known)
    found = dict(
        zip(
            wanted,
            ort.InferenceSession(extended.SerializeToString()).run(wanted, feeds),
            strict=True,
        )
    )
    deployed = dict(zip(entering + leaving, session.run(entering + leaving, feeds), strict=True))
    for name, into, raw, out in zip(layers, entering, leaving, rounded, strict=True):
        different = float(np.mean(found[into] != deployed[into]))
        # Transcendental functions that two graphs fuse differently flip single roundings.
        assert different < 1e-3, name
        if different == 0:
            assert np.array_equal(found[out], deployed[raw]), name


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_structure_goes_through_the_whole_flow(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    topology: Topology = TOPOLOGIES[name]
    torch.manual_seed(7)
    batches = [tuple(torch.randn(shape) for shape in topology.shapes) for _ in range(3)]
    model = trained_like(topology.build(), batches[0])
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = [list(tensors_in(model(*batch))) for batch in batches]

    amct.create_quant_config("config.json", model, batches[0], batch_num=2)
    config = json.loads(Path("config.json").read_text())
    assert sum(isinstance(v, dict) and v["quant_enable"] for v in config.values()) == (
        topology.quantized
    )
    calibration = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    with torch.no_grad():
        for batch, outputs in zip(batches[:2], expected[:2], strict=True):
            for got, want in zip(tensors_in(calibration(*batch)), outputs, strict=True):
                # The float network, up to the rounding of a folded BatchNorm.
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        simulated = [t.numpy() for t in tensors_in(calibration(*batches[2]))]
    amct.save_model("m.onnx", "record.txt", "out/net")

    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the caller's model was changed"
    ledger = {e["name"]: e for e in json.loads(Path("out/net_ledger.json").read_text())["layers"]}
    assert sum(e["status"] == "quantized" for e in ledger.values()) == topology.quantized
    for layer, reason in topology.floats:
        assert ledger[layer]["status"] == "float"
        assert reason in ledger[layer]["reason"]

    fake = onnx.load("out/net_fake_quant_model.onnx")
    names = [i.name for i in fake.graph.input]
    feeds = dict(zip(names, (t.numpy() for t in batches[2]), strict=True))
    session = amct.DeploySession("out/net_deploy_model.onnx")
    check_same_integers(fake, session, feeds)
    faked = ort.InferenceSession("out/net_fake_quant_model.onnx").run(None, feeds)
    deployed = session.run(None, feeds)
    amct.deploy_to_qdq("out/net_deploy_model.onnx", "qdq.onnx")
    fused = ort.InferenceSession("qdq.onnx", exact_products()).run(None, feeds)
    for want, sim, fq, dep, qdq in zip(expected[2], simulated, faked, deployed, fused, strict=True):
        # The same integers and the same float operators around them: equal but for the last
        # bit of transcendental functions that two graphs may fuse differently.
        assert sqnr(fq, dep) > 90
        # torch's float operators round differently from ONNX Runtime's, which flips single
        # integers at rounding boundaries.
        assert sqnr(sim, fq) > 40
        # 8-bit noise of a few random layers; a wrong scale, bias or padding costs far more.
        assert sqnr(want.numpy(), dep) > 22
        # Convolutions that feed float operators get quantizers of their own there: 8-bit noise
        # of their outputs. Elsewhere roundings differ in single integers.
        assert sqnr(dep, qdq) > 36
