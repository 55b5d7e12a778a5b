"""Quantization-aware training on two processes (DistributedDataParallel over gloo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amct_pytorch.record.record_file import read_record
from flows.test_processes import free_port, launch

HERE = Path(__file__).parent
SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from flows.retraining_case import evaluated, loss_of
from topologies.networks import TOPOLOGIES, trained_like
import amct_pytorch as amct
from amct_pytorch.flows.trained_files import current_factors
from amct_pytorch.graph.tensors import ModelInputs

torch.set_num_threads(1)
torch.manual_seed(5)
batches = [torch.randn(8, 3, 16, 16) for i in range(8)]
model = trained_like(TOPOLOGIES["residual"].build(), (batches[0],))
for module in model.modules():  # each process would see other statistics of its half
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 0.0
rank, world = 0, 1
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
os.makedirs(f"{{world}}", exist_ok=True)
config, record = f"{{world}}/c.json", f"{{world}}/r.txt"
if rank == 0:
    open("c.cfg", "w").write("batch_num: 2 " + {cfg!r})
    amct.create_quant_retrain_config(config, model, batches[0], "c.cfg")
if world > 1:
    dist.barrier()
trained = amct.create_quant_retrain_model(config, model, record, batches[0])
for module in trained.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eval()
        module.train = lambda mode=True: None
wrapped = DistributedDataParallel(trained) if world > 1 else trained
optimizer = torch.optim.SGD(wrapped.parameters(), 0.02, momentum=0.9)
for batch in batches:
    wrapped.train()
    optimizer.zero_grad()
    loss_of(wrapped(batch.chunk(world)[rank])).backward()
    optimizer.step()
wrapped.eval()
with torch.no_grad():
    outputs = wrapped(batches[0])
torch.save(outputs, f"{{world}}/y{{rank}}.pt")
torch.save(wrapped.state_dict(), f"{{world}}/state{{rank}}.pt")
torch.save(list(current_factors(trained, ModelInputs.of(batches[0])).items()).__repr__(),
           f"{{world}}/factors{{rank}}.pt")
amct.save_quant_retrain_model(config, wrapped, record, f"{{world}}/net{{rank}}", batches[0])
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("weights", ["arq_retrain", "ulq_retrain"])
def test_two_processes_train_what_one_does(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = f"retrain_weight_quant_config {{ {weights} {{ }} }}"
    code = SCRIPT.format(tests=str(HERE.parent), cfg=cfg)
    launch(code, 1, 0)
    launch(code, 2, free_port())
    # Both processes end with the same model, and the first one writes.
    states = [torch.load(f"2/state{rank}.pt") for rank in range(2)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert torch.load("2/factors0.pt") == torch.load("2/factors1.pt")
    assert torch.equal(torch.load("2/y0.pt"), torch.load("2/y1.pt"))
    assert Path("2/net0_deploy_model.onnx").exists()
    assert not Path("2/net1_deploy_model.onnx").exists()
    # It is that of one process with the same batches; gradients are added in another order.
    one, two = (read_record(f"{world}/r.txt").factors for world in (1, 2))
    assert one.keys() == two.keys()
    for name, factors in one.items():
        assert factors.scale_d == pytest.approx(two[name].scale_d, rel=1e-3)
        assert factors.scale_w == pytest.approx(two[name].scale_w, rel=1e-3)
    difference = (torch.load("1/y0.pt") - torch.load("2/y0.pt")).abs().max()
    assert difference < 0.05 * torch.load("1/y0.pt").abs().max()
