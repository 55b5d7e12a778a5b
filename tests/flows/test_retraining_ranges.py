"""Output ranges of a trained network, for runtimes that need them, and evaluating too early."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import onnx
import pytest
import torch
from flows.retraining_case import created, data, evaluated, network, saved, train
from topologies.networks import TOPOLOGIES, TRAINED_TOPOLOGIES, trained_like
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.export.deploy import EXTRA_RANGES
from amct_pytorch.export.qdq_plan import read_extra_ranges
from amct_pytorch.nn.retrain import retrain_layers


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)


def integer_layers(deploy: str) -> set[str]:
    """Layers of the portable QDQ model of a deploy model whose output is quantized too."""
    amct.deploy_to_qdq(deploy, "qdq.onnx")
    model = onnx.load("qdq.onnx")
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    closed = set()
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        tensor = node.output[0]
        while readers.get(tensor) in ("Relu", "Clip"):
            (tensor,) = (n.output[0] for n in model.graph.node if tensor in n.input)
        if readers.get(tensor) == "QuantizeLinear":
            closed.add(node.name)
    return closed


def residual() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    topology = TOPOLOGIES["residual"]
    batches = [tuple(torch.randn(shape) for shape in topology.shapes) for _ in range(3)]
    return trained_like(topology.build(), batches[0]), batches


def test_the_portable_model_has_the_integer_layers_that_calibration_gives() -> None:
    model, batches = residual()
    amct.create_quant_config("c.json", model, batches[0])
    calibrated = amct.quantize_model("c.json", "m.onnx", "r.txt", model, batches[0])
    with torch.no_grad():
        calibrated(*batches[0])
    amct.save_model("m.onnx", "r.txt", "out/ptq")
    wanted = integer_layers("out/ptq_deploy_model.onnx")
    assert "b.0" in wanted  # it feeds the addition
    trained = created(model, batches[0])
    train(trained, batches)
    saved(trained, batches[0])
    assert integer_layers("out/net_deploy_model.onnx") == wanted


def test_output_ranges_are_those_of_the_evaluation_since_the_last_step() -> None:
    model, batches = residual()
    trained = created(model, batches[0])
    train(trained, batches[:1])
    evaluated(trained, (100 * batches[1][0],))
    train(trained, batches[1:2])
    layers = retrain_layers(trained)
    assert [name for name, layer in layers.items() if layer.outputs is not None] == ["b.0"]
    seen: list[Tensor] = []
    hook = trained.b[1].register_forward_hook(lambda _, __, y: seen.append(y))
    for batch in batches:
        evaluated(trained, batch)
    hook.remove()
    saved(trained, batches[0])
    low, high = read_extra_ranges(onnx.load("out/net_deploy_model.onnx"))["b.0"]
    values = torch.cat(seen)
    assert low == pytest.approx(values.min().item(), rel=0.1)
    assert high == pytest.approx(values.max().item(), rel=0.1)
    fake = onnx.load("out/net_fake_quant_model.onnx")
    assert EXTRA_RANGES not in {entry.key for entry in fake.metadata_props}


def test_output_ranges_of_weights_that_are_gone_are_forgotten() -> None:
    model, batches = residual()
    trained = created(model, batches[0])
    train(trained, batches[:1])
    kept = {key: value.clone() for key, value in trained.state_dict().items()}
    with torch.no_grad():
        trained.b[0].layer.weight.mul_(50)
    evaluated(trained, batches[0])
    trained.load_state_dict(kept)
    saved(trained, batches[0])
    seen: list[Tensor] = []
    trained.b[1].register_forward_hook(lambda _, __, y: seen.append(y))
    evaluated(trained, batches[0])
    low, high = read_extra_ranges(onnx.load("out/net_deploy_model.onnx"))["b.0"]
    assert low == pytest.approx(seen[0].min().item(), rel=0.1)
    assert high == pytest.approx(seen[0].max().item(), rel=0.1)


def test_evaluating_in_float_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    batches = data()
    trained = created(network(), batches[0], batch_num=2)
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        caplog.clear()
        for _ in range(2):
            evaluated(trained, batches[0])
        told = [record.message for record in caplog.records if "in float" in record.message]
    assert told == [
        "3 of 3 layers were evaluated in float (0 first): 0 of batch_num 2 training batches have "
        "run, and the ranges of their inputs start from these"
    ]
    ready = created(network(), batches[0])
    train(ready, batches[:1])
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        caplog.clear()
        evaluated(ready, batches[0])
        assert not caplog.records


def test_a_one_dimensional_network_goes_on_where_it_was_stopped() -> None:
    topology = TRAINED_TOPOLOGIES["1-D convolutions"]
    batches = [tuple(torch.randn(shape) for shape in topology.shapes) for _ in range(4)]
    model = topology.build()
    trained = created(model, batches[0])
    types = {"Conv1d": True, "ConvTranspose1d": True, "Linear": False}
    config = json.loads(Path("retrain.json").read_text())
    for name, layer in config.items():
        if isinstance(layer, dict):
            kind = type(model.get_submodule(name)).__name__
            assert layer["retrain_weight_config"]["channel_wise"] == types[kind]
    train(trained, batches[:2])
    torch.save(trained.state_dict(), "stopped.pth")
    again = amct.restore_quant_retrain_model(
        "retrain.json", model, "record.txt", batches[0], "stopped.pth"
    )
    for one in (trained, again):
        train(one, batches[2:])
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
