"""2:4 sparsity through the three public calls."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from test_processes import launch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.errors import ConfigError, ModelError, RecordError
from amct_pytorch.nn.sparse import sparse_layers
from amct_pytorch.record.record_file import read_record
from amct_pytorch.record.selective import selective_nodes

CFG = "prune_config { n_out_of_m_pruner { l1_selective_prune { update_freq: 2 } } }"


class Mixed(nn.Module):
    """Grouped, depthwise, transposed, padded, weight-computing, reused and tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.standard = Standardised(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2, groups=2)
        self.twice = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.norm(self.stem(x))))
        x = self.up(torch.relu(self.standard(torch.relu(self.grouped(x)))))
        return self.head(self.twice(torch.relu(self.twice(x.mean((2, 3))))))


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


SPARSE = ["stem", "grouped", "standard", "up", "head"]


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Mixed().eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prune.cfg").write_text(CFG)
    return tmp_path


def images(number=4):
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def create(model):
    return amct.create_prune_retrain_model(model, images(), "prune.cfg", "record.txt")


def train(model, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(images() + step).square().mean().backward()
        optimizer.step()
    model.eval()
    return optimizer


def operand_of(model, name):
    """The weight that a layer's call is made with."""
    layer = sparse_layers(model)[name]
    weight = layer.weight.detach()
    if name == "standard":
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
    return weight * layer.sparse_mask


def test_train_save_and_the_files_are_sparse(folder, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = create(model)
    assert list(sparse_layers(sparse)) == SPARSE
    train(sparse, 5)
    amct.save_prune_retrain_model(sparse, "out/net", images(), ["x"], ["y"], {"x": {0: "n"}})

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fake, deploy = (Path(f"out/net_{kind}_model.onnx") for kind in ("fake_quant", "deploy"))
    assert fake.read_bytes() == deploy.read_bytes()
    held = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(deploy).graph.initializer
    }
    for name in SPARSE:
        expected = operand_of(sparse, name).numpy()
        stored = held[f"{name}.weight"]
        assert np.array_equal(stored, expected), name
    session = onnxruntime.InferenceSession(deploy, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = sparse(images(6)).numpy()
    found = session.run(None, {"x": images(6).numpy()})[0]
    # Float kernels of two runtimes.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    train(sparse, 1)  # it can go on


def test_the_ledger_tells_of_every_layer(folder, model):
    amct.save_prune_retrain_model(create(model), "out/", images())
    ledger = json.loads(Path("out/ledger.json").read_text())
    layers = {entry["name"]: entry for entry in ledger["layers"]}
    assert [name for name, entry in layers.items() if entry["status"] == "2:4"] == SPARSE
    # Three input channels: one of the four is padding, so two of three stay.
    assert layers["stem"]["kept"] == 8 * 2 * 9
    assert layers["grouped"]["kept"] == 8 * 4 * 9 // 2
    assert 0.5 < layers["grouped"]["magnitude_kept"] < 1
    assert "one input channel in a group" in layers["depthwise"]["reason"]
    assert "reused layer: it ran 2 times" in layers["twice"]["reason"]
    assert ledger["totals"]["kept"] < ledger["totals"]["weights"]
    drawn = [node["name"] for node in ledger["network"]["nodes"] if node["kind"] == "layer"]
    assert set(SPARSE) <= set(drawn)


def test_restored_training_goes_on_exactly(folder, model):
    sparse = create(model)
    optimizer = train(sparse, 3)
    torch.save({"net": sparse.state_dict(), "sgd": optimizer.state_dict()}, "state.pth")
    restored = amct.restore_prune_retrain_model(
        model, images(), "record.txt", "prune.cfg", "state.pth", "net"
    )
    again = torch.optim.SGD(restored.parameters(), 0.2, momentum=0.9)
    again.load_state_dict(torch.load("state.pth", weights_only=True)["sgd"])
    train(sparse, 4, optimizer)
    train(restored, 4, again)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def test_the_record_has_shapes_and_masks(folder, model):
    sparse = create(model)
    record = read_record("record.txt")
    assert [entry.selective_prune.name for entry in record.message.prune_record] == SPARSE
    graph = amct_look(model)
    nodes = selective_nodes(record, graph.layers)
    for name, layer in sparse_layers(sparse).items():
        assert nodes[name].shape == tuple(layer.sparse_mask.shape)
        assert torch.equal(nodes[name].mask, layer.sparse_mask)


def test_a_record_without_masks_is_fine(folder, model):
    create(model)
    mask = re.compile(r'    attr \{\n      name: "selective_mask".*?\n    \}\n', re.DOTALL)
    Path("shapes.txt").write_text(mask.sub("", Path("record.txt").read_text()))
    assert "selective_mask" not in Path("shapes.txt").read_text()
    sparse = create(model)
    torch.save(sparse.state_dict(), "state.pth")
    restored = amct.restore_prune_retrain_model(
        model, images(), "shapes.txt", "prune.cfg", "state.pth"
    )
    assert torch.equal(restored(images()), sparse(images()))


def amct_look(model):
    from amct_pytorch.graph.look import look_at
    from amct_pytorch.graph.tensors import ModelInputs

    return look_at(model, ModelInputs.of(images()))


def test_a_record_of_another_model(folder, model):
    sparse = create(model)
    torch.save(sparse.state_dict(), "state.pth")
    other = Mixed()
    other.head = nn.Linear(12, 7)
    with pytest.raises(RecordError, match=r"\[head\].mask_shape is \[5, 12\].* has \[7, 12\]"):
        amct.restore_prune_retrain_model(other, images(), "record.txt", "prune.cfg", "state.pth")


def test_a_record_of_another_config(folder, model):
    torch.save(create(model).state_dict(), "state.pth")
    Path("other.cfg").write_text(CFG + ' regular_prune_skip_layers: "up"')
    with pytest.raises(RecordError, match=r"up is sparse here, but other\.cfg leaves it dense"):
        amct.restore_prune_retrain_model(model, images(), "record.txt", "other.cfg", "state.pth")


def test_a_checkpoint_of_the_dense_model(folder, model):
    create(model)
    torch.save(model.state_dict(), "state.pth")
    with pytest.raises(ModelError, match=r"it lacks 'stem\.sparse_mask' and 9 more"):
        amct.restore_prune_retrain_model(model, images(), "record.txt", "prune.cfg", "state.pth")


def test_nothing_to_prune_writes_nothing(folder, model):
    Path("prune.cfg").write_text("retrain_weight_quant_config { arq_retrain { } }")
    with pytest.raises(ConfigError, match="asks for no sparsity"):
        create(model)
    Path("prune.cfg").write_text(
        CFG + "".join(f' skip_layer_types: "{t}"' for t in ("Conv2d", "Linear", "ConvTranspose2d"))
    )
    with pytest.raises(ConfigError, match="no layer of the model can be 2:4 sparse; stem: the"):
        create(model)
    assert not Path("record.txt").exists()


DDP = """
import os, torch
from torch import distributed as dist, nn
import amct_pytorch as amct

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
data = torch.randn(6, 4, 4, 4, 4)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
sparse = amct.create_prune_retrain_model(model, data[0], "prune.cfg", f"record{world}.txt").train()
trained = nn.parallel.DistributedDataParallel(sparse) if world > 1 else sparse
optimizer = torch.optim.SGD(trained.parameters(), 0.5)
for batch in data:
    optimizer.zero_grad()
    trained(batch[rank::world]).square().mean().backward()
    optimizer.step()
torch.save(trained.state_dict(), f"state{rank}of{world}.pth")
if rank == 0:
    amct.save_prune_retrain_model(trained, f"net{world}", data[0])
    if world > 1:
        restored = amct.restore_prune_retrain_model(
            model, data[0], f"record{world}.txt", "prune.cfg", f"state{rank}of{world}.pth")
        assert torch.equal(restored.eval()(data[0]), sparse.eval()(data[0]))
if world > 1:
    dist.destroy_process_group()
"""


def test_training_on_two_processes_is_training_on_one(folder):
    launch(DDP, 1, 29731)
    launch(DDP, 2, 29732)
    one = torch.load("state0of1.pth", weights_only=True)
    first, second = (torch.load(f"state{rank}of2.pth", weights_only=True) for rank in range(2))
    for name, value in one.items():
        assert torch.equal(first[f"module.{name}"], second[f"module.{name}"]), name
        # The same mean of gradients, summed in another order.
        torch.testing.assert_close(first[f"module.{name}"], value, rtol=1e-4, atol=1e-5)
    assert Path("net2_deploy_model.onnx").exists()
