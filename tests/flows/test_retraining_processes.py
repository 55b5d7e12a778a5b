"""Quantization-aware training on two processes (DistributedDataParallel over gloo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flows.test_processes import free_port, launch

from amct_pytorch.record.record_file import read_record

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
for weights in ("arq_retrain", "ulq_retrain"):
    prefix = f"{{world}}/{{weights}}"
    config, record = f"{{prefix}}.json", f"{{prefix}}.txt"
    if rank == 0:
        open("c.cfg", "w").write(
            "batch_num: 2 retrain_weight_quant_config {{ " + weights + " {{ }} }}"
        )
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
    torch.save(outputs, f"{{prefix}}.y{{rank}}")
    torch.save(wrapped.state_dict(), f"{{prefix}}.state{{rank}}")
    factors = current_factors(trained, ModelInputs.of(batches[0]))
    open(f"{{prefix}}.factors{{rank}}", "w").write(repr(factors))
if world > 1:
    amct.save_quant_retrain_model(config, wrapped, record, f"2/net{{rank}}", batches[0])
    dist.destroy_process_group()
"""


def test_two_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = SCRIPT.format(tests=str(HERE.parent))
    launch(code, 1, 0)
    launch(code, 2, free_port())
    for weights in ("arq_retrain", "ulq_retrain"):
        # Both processes end with the same model.
        states = [torch.load(f"2/{weights}.state{rank}") for rank in range(2)]
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), key
        factors = [Path(f"2/{weights}.factors{rank}").read_text() for rank in range(2)]
        assert factors[0] == factors[1]
        outputs = [torch.load(f"2/{weights}.y{rank}") for rank in range(2)]
        assert torch.equal(*outputs)
        # It is that of one process with the same batches; gradients are added in another order.
        one, two = (read_record(f"{world}/{weights}.txt").factors for world in (1, 2))
        assert one.keys() == two.keys()
        for name, known in one.items():
            assert known.scale_d == pytest.approx(two[name].scale_d, rel=1e-3)
            assert known.scale_w == pytest.approx(two[name].scale_w, rel=1e-3)
        alone = torch.load(f"1/{weights}.y0")
        assert (alone - outputs[0]).abs().max() < 0.05 * alone.abs().max()
    # The first process writes.
    assert Path("2/net0_deploy_model.onnx").exists()
    assert not Path("2/net1_deploy_model.onnx").exists()
