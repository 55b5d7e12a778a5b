"""Calibration on several processes is calibration on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.mean_input import MeanInput
from amct_pytorch.record.record_file import read_record

HERE = Path(__file__).parent
SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from torch import distributed as dist
from topologies.networks import TOPOLOGIES, trained_like
import amct_pytorch as amct

torch.set_num_threads(1)
torch.manual_seed(5)
batches = [torch.randn(3, 3, 16, 16) * (1 + i) for i in range({batches})]
model = trained_like(TOPOLOGIES[{name!r}].build(), (batches[0],))
rank, world = 0, 1
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
folder = f"{{world}}"
os.makedirs(folder, exist_ok=True)
if rank == 0:
    amct.create_quant_config(f"{{folder}}/c.json", model, batches[0], batch_num=len(batches))
if world > 1:
    dist.barrier()
config, modified, record = (f"{{folder}}/{{name}}" for name in ("c.json", "m.onnx", "r.txt"))
quantized = amct.quantize_model(config, modified, record, model, batches[0])
with torch.no_grad():
    for batch in batches[rank::world]:
        quantized(batch)
    torch.save(quantized(batches[1]), f"{{folder}}/y{{rank}}.pt")
if rank == 0:
    amct.save_model(modified, record, f"{{folder}}/net")
if world > 1:
    dist.destroy_process_group()
"""


def launch(code: str, processes: int, port: int) -> list[str]:
    """Standard error of each process, which must all end well."""
    script = Path("script.py")
    script.write_text(code)
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in range(processes):
        environment = dict(shared)
        if processes > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
        running.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    told = [process.communicate(timeout=300)[0].decode() for process in running]
    for process, text in zip(running, told, strict=True):
        assert process.returncode == 0, text
    return told


def free_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


# Of 5 batches, the processes have 3 and 2, and the last one belongs to the first process.
@pytest.mark.parametrize(("name", "batches"), [("chain", 5), ("residual", 2)])
def test_two_processes_write_what_one_does(
    name: str, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = SCRIPT.format(tests=str(HERE.parent), name=name, batches=batches)
    launch(code, 1, 0)
    launch(code, 2, free_port())
    assert read_record("2/r.txt").factors == read_record("1/r.txt").factors
    one, two = (onnx.load(f"{world}/m.onnx") for world in (1, 2))
    tensors = {t.name: numpy_helper.to_array(t) for t in one.graph.initializer}
    for tensor in two.graph.initializer:
        # Mean inputs are sums of floats, whose order is another one.
        assert np.allclose(numpy_helper.to_array(tensor), tensors[tensor.name], atol=1e-5)
    ledgers = [json.loads(Path(f"{world}/net_ledger.json").read_text()) for world in (1, 2)]
    for a, b in zip(*(ledger["layers"] for ledger in ledgers), strict=True):
        assert a["status"] == b["status"]
        assert a["input_range"] == b["input_range"]
        assert a["sqnr_db"] == pytest.approx(b["sqnr_db"], abs=0.05)
    results = [torch.load(f"2/y{rank}.pt") for rank in range(2)]
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], torch.load("1/y0.pt"), atol=1e-3, rtol=1e-3)


BRANCHES = """
class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = torch.nn.Linear(48, 8), torch.nn.Linear(48, 8)
        self.last = torch.nn.Linear(8, 4)
    def forward(self, items):
        x = items.flatten(1)[:, :48]
        x = self.large(x) if len(items) > 3 else self.small(x)
        return self.last(torch.relu(x))
model = Branches().eval()
"""


def test_layers_that_ran_in_one_process_only_are_corrected_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = SCRIPT.format(tests=str(HERE.parent), name="chain", batches=2)
    code = code.replace("rank, world = 0, 1", BRANCHES + "rank, world = 0, 1")
    # The example and the first process's batch take the small way, the last batch the large one.
    code = code.replace("torch.randn(3, 3, 16, 16) * (1 + i)", "torch.randn(3 + i, 3, 16, 16)")
    launch(code, 1, 0)
    launch(code, 2, free_port())
    one, two = (onnx.load(f"{world}/m.onnx") for world in (1, 2))
    tensors = {t.name: numpy_helper.to_array(t) for t in one.graph.initializer}
    for tensor in two.graph.initializer:
        assert np.allclose(numpy_helper.to_array(tensor), tensors[tensor.name], atol=1e-5)


BALANCE = """
import json
if rank == 0:  # who reads while another writes may find half a file
    with open(f"{folder}/c.json") as file:
        document = json.load(file)
    for value in document.values():
        if isinstance(value, dict):
            value["dmq_balancer_param"] = 0.5
    with open(f"{folder}/c.json", "w") as file:
        json.dump(document, file)
if world > 1:
    dist.barrier()
watched = amct.quantize_preprocess(f"{folder}/c.json", f"{folder}/r.txt", model, batches[0])
watched(batches[rank] if world > 1 else torch.cat(batches[:2]))
"""


def test_two_processes_balance_with_what_both_have_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = SCRIPT.format(tests=str(HERE.parent), name="chain", batches=2)
    begin, end = code.split("config, modified", 1)
    code = begin + BALANCE + "config, modified" + end
    launch(code, 1, 0)
    launch(code, 2, free_port())
    one, two = (read_record(f"{world}/r.txt").factors for world in (1, 2))
    assert all(found.balance for found in one.values())
    assert one == two


FAILS = """
import sys
from torch import distributed as dist
from amct_pytorch.processes import gathered, in_one_process

class Own(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

def fails():
    raise Own("this", "that")

dist.init_process_group("gloo")
assert gathered(dist.get_rank()) == [0, 1]
try:
    in_one_process(fails, 1)
except Exception as error:
    assert "this and that" in str(error)
else:
    sys.exit(1)
dist.destroy_process_group()
"""


def test_an_error_that_cannot_be_sent_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launch(FAILS, 2, free_port())


def test_fewer_batches_than_processes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = SCRIPT.format(tests=str(HERE.parent), name="chain", batches=2)
    code = code.replace("batch_num=len(batches)", "batch_num=1").replace(
        "quantized = amct", "try:\n    quantized = amct"
    )
    code = code.split("with torch.no_grad()")[0]
    code += "except amct.AmctError as error:\n    print(error)\nelse:\n    raise SystemExit(1)\n"
    for text in launch(code, 2, free_port()):
        assert "batch_num is 1 and there are 2 processes" in text


def test_sixty_four_observers_merged_are_one_over_all_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(500, generator=generator) * 10 ** (i % 5 - 2) for i in range(64)]
    whole, merged = Histogram(), Histogram()
    mean, merged_mean = MeanInput(), MeanInput()
    for part in parts:
        whole.update(part)
        mean.update(part.view(50, 10), channels_last=True)
        own, own_mean = Histogram(), MeanInput()
        own.update(part)
        own_mean.update(part.view(50, 10), channels_last=True)
        merged.merge(own)
        merged_mean.merge(own_mean)
    assert (merged.low, merged.high, merged.total) == (whole.low, whole.high, whole.total)
    assert torch.equal(merged.counts, whole.counts)
    assert merged.kth_largest(7) == whole.kth_largest(7)
    assert merged.kth_smallest(900) == whole.kth_smallest(900)
    (a, items), (b, others) = merged_mean.means()[0], mean.means()[0]
    assert items == others == 64 * 50
    torch.testing.assert_close(a, b)
