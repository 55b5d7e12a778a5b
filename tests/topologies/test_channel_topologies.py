"""Channel pruning on every structure: the pruned network is the whole one with channels zeroed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from topologies.channel_networks import CASES, Case
from topologies.zeroed import zeroed
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.flows.channel_pruning import channel_graph, kept_ledger
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs, tensors_in
from amct_pytorch.record.prune_groups import gone_of_record
from amct_pytorch.record.record_file import read_record

CFG = """prune_config {{ filter_pruner {{ balanced_l2_norm_filter_prune {{
    prune_ratio: {ratio} ascend_optimized: false }} }} }}"""
# Those whose ONNX files are written and run here; exporting each would take minutes.
EXPORTED = (
    "channel_shuffle", "chunk_gate", "concat_into_residual", "convnext_block", "flatten_to_linear",
    "grouped", "group_norm", "transposed_grouped",
)  # fmt: skip


def built(name: str) -> tuple[nn.Module, Any]:
    """A network with weights in which nothing is zero or one by chance, and its input."""
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            low, high = (-1, 1) if key.endswith("bias") else (0.5, 1.5)
            parameter.data.uniform_(low, high)
    return model, CASES[name].inputs()


def pruned_by(model: nn.Module, x: Any, folder: Path, case: Case) -> nn.Module:
    (folder / "prune.cfg").write_text(CFG.format(ratio=case.ratio))
    return amct.create_prune_retrain_model(model, x, folder / "prune.cfg", folder / "record.txt")


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(model(x)))


def graph_of(model: nn.Module, x: Any) -> ChannelGraph:
    inputs = ModelInputs.of(x)
    return channel_graph(model, inputs, look_at(model, inputs))


@pytest.mark.parametrize("name", CASES)
def test_pruned_network_is_the_whole_one_with_channels_zeroed(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, x = built(name)
    before = copy.deepcopy(model.state_dict())
    pruned = pruned_by(model, x, tmp_path, case)
    graph = graph_of(model, x)
    gone = gone_of_record(read_record(tmp_path / "record.txt"), graph)
    reference = zeroed(model, graph.flow.slots, graph.alive(gone))
    for wanted, got in zip(outputs(reference, x), outputs(pruned, x), strict=True):
        # Only the order of sums differs.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    groups = {name: group.index for group in graph.groups for name in group.names}
    assert [layer for layer in case.pruned if groups[layer] not in gone] == []
    for layer, _ in case.whole:
        module, whole = pruned.get_submodule(layer), model.get_submodule(layer)
        if "depthwise" not in (graph.why_whole(layer) or ""):
            for count in ("out_channels", "out_features"):
                assert getattr(module, count, None) == getattr(whole, count, None)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.whole])
def test_what_stays_whole_says_why(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, x = built(name)
    pruned = pruned_by(model, x, tmp_path, case)
    ledger = kept_ledger(pruned)
    assert ledger is not None
    reasons = {layer.name: layer.reason for layer in ledger.layers}
    reasons |= {producer: group.reason for group in ledger.groups for producer in group.producers}
    for layer, reason in case.whole:
        if "depthwise" in reason:
            reasons[layer] = graph_of(model, x).why_whole(layer)
        assert reason in (reasons[layer] or "")


@pytest.mark.parametrize("name", CASES)
def test_pruned_network_trains_and_comes_back_from_record_and_checkpoint(
    name: str, tmp_path: Path
) -> None:
    model, x = built(name)
    pruned = pruned_by(model, x, tmp_path, CASES[name]).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    if name != "numpy_in_the_middle":  # no gradient passes through numpy anyway
        sum(y.square().mean() for y in tensors_in(pruned(x))).backward()
        gradients = [p.grad for p in pruned.parameters() if p.grad is not None]
        assert gradients
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        optimizer.step()
    pruned.eval()
    torch.save(pruned.state_dict(), tmp_path / "trained.pth")
    restored = amct.restore_prune_retrain_model(
        model, x, tmp_path / "record.txt", tmp_path / "prune.cfg", tmp_path / "trained.pth"
    )
    for wanted, got in zip(outputs(pruned, x), outputs(restored.eval(), x), strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_files_of_a_pruned_network_run(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = built(name)
    pruned = pruned_by(model, x, tmp_path, CASES[name])
    amct.save_prune_retrain_model(pruned, tmp_path / "net", x, ["x"], ["y"])
    files = [tmp_path / f"net_{kind}_model.onnx" for kind in ("fake_quant", "deploy")]
    assert files[0].read_bytes() == files[1].read_bytes()
    session = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": x.numpy()})
    np.testing.assert_allclose(found, outputs(pruned, x)[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["grouped", "depthwise", "transposed_grouped", "group_norm"])
def test_attributes_of_pruned_modules_say_what_their_weights_are(name: str, tmp_path: Path) -> None:
    model, x = built(name)
    pruned = pruned_by(model, x, tmp_path, CASES[name])
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert module.weight.shape[:2] == shape
        elif isinstance(module, nn.ConvTranspose2d):
            shape = (module.in_channels, module.out_channels // module.groups)
            assert module.weight.shape[:2] == shape
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == (module.num_features,)
        elif isinstance(module, nn.GroupNorm):
            assert module.weight.shape == (module.num_channels,)
            assert module.num_channels % module.num_groups == 0
