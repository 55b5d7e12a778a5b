"""ADA through the whole flow."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from topologies.networks import TOPOLOGIES, trained_like
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.export.layer_nodes import LayerFinder
from amct_pytorch.export.onnx_file import load_onnx
from amct_pytorch.export.onnx_graph import OnnxGraph
from amct_pytorch.graph.tensors import tensors_in
from amct_pytorch.record.record_file import read_record
from amct_pytorch.spill import Spill

NAMES = [
    "chain",
    "residual",
    "depthwise, groups and dilation",
    "conv and BN subclasses",
    "transposed convolutions",
    "control flow",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(model: nn.Module, x: tuple[Tensor, ...], batch_num: int, **ada: object) -> dict:
    amct.create_quant_config("config.json", model, x, batch_num=batch_num)
    document = json.loads(Path("config.json").read_text())
    for value in document.values():
        if isinstance(value, dict) and ada:
            asked = value["weight_quant_params"]
            asked.update(wts_algo="ada_quantize", **ada)
    Path("config.json").write_text(json.dumps(document))
    return document


@pytest.mark.parametrize("name", NAMES)
def test_deployed_is_simulated_and_layers_are_nearer_than_by_nearest_rounding(name: str) -> None:
    topology = TOPOLOGIES[name]
    torch.manual_seed(7)
    batches = [tuple(torch.randn(shape) for shape in topology.shapes) for _ in range(3)]
    model = trained_like(topology.build(), batches[0])
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = [next(tensors_in(model(*batch))) for batch in batches]
    config(model, batches[0], 2, num_bits=4, num_iteration=20)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    with torch.no_grad():
        for batch, wanted in zip(batches[:2], expected, strict=False):
            assert torch.allclose(next(tensors_in(quantized(*batch))), wanted, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    amct.save_model("m.onnx", "record.txt", "out/net")
    ledger = json.loads(Path("out/net_ledger.json").read_text())
    told = re.findall(r"ADA: error on its rows ([0-9.]+) of", json.dumps(ledger))
    assert len(told) == sum(entry["status"] == "quantized" for entry in ledger["layers"])
    assert max(map(float, told)) <= 1.0
    assert min(map(float, told)) < 0.7
    fake = ort.InferenceSession("out/net_fake_quant_model.onnx")
    deploy = amct.DeploySession("out/net_deploy_model.onnx")
    names = [entry.name for entry in fake.get_inputs()]
    feeds = {n: t.numpy() for n, t in zip(names, batches[2], strict=True)}
    simulated = fake.run(None, feeds)[0]
    assert np.allclose(deploy.run(None, feeds)[0], simulated, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch_result = next(tensors_in(quantized(*batches[2]))).numpy()
    assert np.allclose(simulated, torch_result, rtol=1e-4, atol=1e-4)


def chain() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(5)
    batches = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    return trained_like(TOPOLOGIES["chain"].build(), (batches[0],)), batches


def test_the_files_say_what_was_learned() -> None:
    model, batches = chain()
    config(model, (batches[0],), 2, num_bits=4, num_iteration=20)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    for batch in batches:
        quantized(batch)
    # Weights in the modified ONNX are on their grid; rounding them to the nearest is the learned
    # rounding, whatever tool does it.
    finder = LayerFinder(OnnxGraph(load_onnx("m.onnx", "m")))
    for name, factors in read_record("record.txt").factors.items():
        layer = finder.find(name)
        scale = np.asarray(factors.scale_w, np.float32)
        rows = layer.layout.rows(layer.weight) / scale.reshape(-1, 1)
        assert np.abs(rows - np.rint(rows)).max() < 1e-4
    amct.save_model("m.onnx", "record.txt", "net")
    ledger = json.loads(Path("net_ledger.json").read_text())
    notes = [note for layer in ledger["layers"] for note in layer["notes"]]
    assert sum("ADA" in note for note in notes) == 3
    assert ledger["seconds"]["learn rounding"] > 0


def test_runs_are_the_same_and_leave_the_random_state_alone() -> None:
    model, batches = chain()
    records = []
    state = torch.get_rng_state()
    for _ in range(2):
        config(model, (batches[0],), 2, num_bits=4, num_iteration=20)
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
        for batch in batches:
            quantized(batch)
        amct.save_model("m.onnx", "record.txt", "net")
        names = ("record.txt", "net_deploy_model.onnx", "net_fake_quant_model.onnx")
        records.append([Path(name).read_bytes() for name in names])
    assert records[0] == records[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bits", [8, 7, 6, 4])
def test_every_number_of_bits_and_the_fewer_the_more_is_won(bits: int) -> None:
    torch.manual_seed(11)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.PReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.GELU(),
        nn.Flatten(), nn.Linear(6 * 64, 10), nn.Tanh(),
    ).eval()  # fmt: skip
    batches = [torch.randn(8, 4, 6, 6) for _ in range(3)]
    off = {}
    # Without ADA the contract has 6 and 7 bits for Conv2d only.
    for ada in ({"num_iteration": 30}, {})[: 1 if bits in (6, 7) else 2]:
        document = config(model, (batches[0],), 2, **ada)
        for layer in document.values():
            if isinstance(layer, dict):
                layer["weight_quant_params"]["num_bits"] = bits
        Path("config.json").write_text(json.dumps(document))
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
        with torch.no_grad():
            for batch in batches[:2]:
                quantized(batch)
            wanted = model(batches[2])
            off[bool(ada)] = float((quantized(batches[2]) - wanted).norm() / wanted.norm())
        found = read_record("record.txt").factors.values()
        assert [factors.weight_bits for factors in found] == 3 * [bits]
        amct.save_model("m.onnx", "record.txt", "net")
        session = amct.DeploySession("net_deploy_model.onnx")
        deployed = session.run(None, {session.get_inputs()[0].name: batches[2].numpy()})[0]
        with torch.no_grad():
            simulated = quantized(batches[2]).numpy()
        assert np.allclose(deployed, simulated, atol=1e-4)
    assert off[True] < {8: 0.03, 7: 0.04, 6: 0.07, 4: 0.25}[bits]
    if bits == 4:
        assert off[True] < off[False]


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_activations_that_wait_on_disk_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = TOPOLOGIES[name]
    torch.manual_seed(7)
    batches = [tuple(torch.randn(shape) for shape in topology.shapes) for _ in range(3)]
    model = trained_like(topology.build(), batches[0])
    records, set_aside = [], 0
    original = Spill.set_aside

    def counted(spill: Spill, x: Tensor) -> None:
        nonlocal set_aside
        set_aside += 1
        original(spill, x)

    monkeypatch.setattr(Spill, "set_aside", counted)
    for limit in (2**30, 0):
        monkeypatch.setattr("amct_pytorch.nn.reconstruct.WAITING_BYTES", limit)
        config(model, batches[0], 3, num_bits=4, num_iteration=10)
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
        with torch.no_grad():
            for batch in batches:
                quantized(*batch)
            records.append((Path("record.txt").read_text(), quantized(*batches[0])))
        assert set_aside == (0 if limit else 3 * len(read_record("record.txt").factors))
    assert records[0][0] == records[1][0]
    assert torch.equal(next(tensors_in(records[0][1])), next(tensors_in(records[1][1])))


def test_a_model_under_autocast_is_learned_as_it_is_calibrated() -> None:
    model, batches = chain()
    config(model, (batches[0],), 2, num_bits=4, num_iteration=10)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    seen = []
    model_types = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, y: model_types.append(y.dtype) if isinstance(module, nn.ReLU) else None
    )
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for batch in batches:
                quantized(batch)
                seen.append(set(model_types))
    finally:
        hook.remove()
    # The passes that ADA makes run in threads of their own, with the types of the first.
    assert seen[0] == seen[1] == {torch.bfloat16}


def test_one_layer_can_be_learned_alone() -> None:
    model, batches = chain()
    document = config(model, (batches[0],), 2)
    document["head"]["weight_quant_params"] = {"wts_algo": "ada_quantize", "num_bits": 4}
    Path("config.json").write_text(json.dumps(document))
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    for batch in batches:
        quantized(batch)
    factors = read_record("record.txt").factors
    assert [found.weight_bits for found in factors.values()] == [8, 8, 4]


class Remembers(nn.Module):
    """Keeps what it has computed on itself between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.relu(self.first(x))
        y = self.second(self.kept)
        assert self.kept is not None
        return y + self.kept[:, :4]


def test_a_forward_that_keeps_state_is_not_mixed_up_between_batches() -> None:
    torch.manual_seed(1)
    model = Remembers()
    batches = [torch.randn(4, 6) * (10.0 ** (i - 1)) for i in range(3)]
    config(model, (batches[0],), 3, num_iteration=10)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    for batch in batches:
        quantized(batch)
    with torch.no_grad():
        y, wanted = quantized(batches[2]), model(batches[2])
    assert float((y - wanted).norm() / wanted.norm()) < 0.05


class Branches(nn.Module):
    """Goes another way for small batches, and takes a mask of bool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x))).mean((2, 3)) * mask
        x = self.a(x) if len(x) > 4 else self.b(x)
        return self.head(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_branches_pools_other_types_and_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = Branches().eval().to(dtype)
    masks = [torch.tensor([[True, False, True, True]]) for _ in range(4)]
    sizes = (8, 3, 8, 3)
    batches = [(torch.randn(n, 2, 6, 6).to(dtype), m) for n, m in zip(sizes, masks, strict=True)]
    config(model, batches[0], 4, num_iteration=5)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    with torch.no_grad():
        for batch in batches:
            quantized(*batch)
        for batch in batches[:2]:
            y, wanted = quantized(*batch).float(), model(*batch).float()
            assert float((y - wanted).norm() / wanted.norm()) < 0.1
    amct.save_model("m.onnx", "record.txt", "net")
    layers = json.loads(Path("net_ledger.json").read_text())["layers"]
    notes = {layer["name"]: json.dumps(layer["notes"]) for layer in layers}
    assert "ADA: error" in notes["stem"] and "ADA: error" in notes["head"]
    assert "ADA is for Conv2d, ConvTranspose2d, Linear" in notes["pool"]


def test_nothing_is_left_of_the_inputs_that_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    model, batches = chain()
    config(model, (batches[0],), 2, num_iteration=5)
    quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
    for batch in batches:
        quantized(batch)
    assert f"are kept in {kept}" in Path("amct_log/amct_pytorch.log").read_text()
    assert not any(kept.rglob("*"))


@pytest.mark.parametrize(("samples", "told"), [(4, True), (64, False)])
def test_too_few_rows_for_a_layer_are_told(
    samples: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(samples, 32)
    amct.create_quant_config("c.json", model, x, batch_num=1)
    document = json.loads(Path("c.json").read_text())
    for name in ("0", "2"):
        document[name]["weight_quant_params"] |= {"wts_algo": "ada_quantize", "num_iteration": 10}
    Path("c.json").write_text(json.dumps(document))
    with torch.no_grad():
        amct.quantize_model("c.json", "m.onnx", "r.txt", model, x)(x)
    said = "2 of 2 layers have fewer rows of calibration data than weights for each output"
    assert (f"{said} (0 (4 < 32) first)" in caplog.text) == told
