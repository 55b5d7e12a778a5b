"""Models in float16 and bfloat16, mixed ones, and ones with autocast regions of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from topologies.networks import TOPOLOGIES, conv_bn, trained_like
from topologies.test_topologies import sqnr
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.errors import ExportError
from amct_pytorch.export.onnx_graph import attribute
from amct_pytorch.graph.tensors import tensors_in


class Mixed(nn.Module):
    """A trunk in half precision and a head in float32, or the other way round."""

    def __init__(self, trunk: torch.dtype, head: torch.dtype) -> None:
        super().__init__()
        self.conv, self.head = conv_bn(3, 8), nn.Linear(8, 5)
        self.types = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x.to(self.types[0])))
        return self.head(x.mean((2, 3)).to(self.types[1]))


class WithAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.head = conv_bn(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.relu(self.mid(torch.relu(self.conv(x)).mean((2, 3))))
        return self.head(x.float())


class ComputedUnderAutocast(nn.Module):
    """A layer whose weight is computed in its call, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.second, self.head = LowRank(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.float())


class LowRank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight @ self.weight, self.bias)


class AutocastJoinsTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(x.bfloat16()).float()


class Flow:
    """One model through the whole flow in the working directory.

    Attributes:
        original: float outputs of the user's model on a fresh batch.
        simulated: outputs of the calibrated module on it.
        feeds: that batch for the ONNX files, in the types of their inputs.
    """

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
        before = copy.deepcopy(model.state_dict())
        amct.create_quant_config("config.json", model, batches[0], batch_num=2)
        calibration = amct.quantize_model("config.json", "m.onnx", "record.txt", model, batches[0])
        with torch.no_grad():
            self.original = list(tensors_in(model(*batches[2])))
            calibration(*batches[0])
            calibration(*batches[1])
            self.simulated = list(tensors_in(calibration(*batches[2])))
        amct.save_model("m.onnx", "record.txt", "net")
        amct.deploy_to_qdq("net_deploy_model.onnx", "qdq.onnx")
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), f"{key} of the caller's model was changed"
        self.session = amct.DeploySession("net_deploy_model.onnx")
        self.feeds = {
            value.name: (x if value.type == "tensor(float16)" else x.float()).numpy()
            for value, x in zip(self.session.get_inputs(), batches[2], strict=True)
        }

    def deployed(self) -> list[np.ndarray]:
        return self.session.run(None, self.feeds)

    def stock(self, path: str) -> list[np.ndarray]:
        options = ort.SessionOptions()
        if path == "qdq.onnx":
            # What the file says: kernels that fuse it round in ways of their own.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return list(ort.InferenceSession(path, options).run(None, self.feeds))

    def check_same_integers(self) -> None:
        """Fake-quant and deploy: the same integers in every layer, the same outputs."""
        fake = onnx.load("net_fake_quant_model.onnx")
        made = {name for node in fake.graph.node for name in node.output}
        layers = self.session.layers
        # The means that an AveragePool yields are no integers and are not rounded.
        rounded = {f"{name}.round.output0": pair[1] for name, pair in layers.items()}
        rounds = [name for name in rounded if name in made]
        entering = [pair[0] for pair in layers.values()]
        fake.graph.output.extend(onnx.ValueInfoProto(name=n) for n in (*rounds, *entering))
        session = ort.InferenceSession(fake.SerializeToString())
        faked = session.run([*rounds, *entering], self.feeds)
        leaving = [rounded[name] for name in rounds]
        deployed = self.session.run([*leaving, *entering], self.feeds)
        for name, a, b in zip([*rounds, *entering], faked, deployed, strict=True):
            assert np.array_equal(a, b), name
        for a, b in zip(self.stock("net_fake_quant_model.onnx"), self.deployed(), strict=True):
            np.testing.assert_array_equal(a, b)


def flow(
    build: Callable[[], nn.Module], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> Flow:
    torch.manual_seed(7)
    batches = [tuple(torch.randn(shape) for shape in shapes) for _ in range(3)]
    model = trained_like(build(), batches[0]).to(dtype)
    return Flow(model, [tuple(x.to(dtype) for x in batch) for batch in batches])


def dequant_types() -> set[int]:
    nodes = onnx.load("net_deploy_model.onnx").graph.node
    return {attribute(node, "dtype") for node in nodes if node.op_type == "AscendDequant"}


def near(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    return sqnr(np.asarray(torch.as_tensor(a).double()), np.asarray(torch.as_tensor(b).double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["residual", "conv and BN subclasses", "attention", "average pools"]
)
def test_a_model_in_half_precision(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = flow(TOPOLOGIES[name].build, TOPOLOGIES[name].shapes, dtype)
    half = dtype == torch.float16
    assert dequant_types() == {int(half)}
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    for path in ("m.onnx", "net_fake_quant_model.onnx", "net_deploy_model.onnx", "qdq.onnx"):
        graph = onnx.load(path).graph
        for value in (*graph.input, *graph.output):
            assert value.type.tensor_type.elem_type == kind, path
        assert all(t.data_type != TensorProto.BFLOAT16 for t in graph.initializer), path
    found.check_same_integers()
    files = ("m.onnx", "qdq.onnx")
    stock = [found.stock(path) for path in files]
    for i, deployed in enumerate(found.deployed()):
        assert found.simulated[i].dtype == dtype
        # Half precision between layers flips integers at rounding boundaries; bfloat16, which
        # has 8 bits itself, in the simulation only.
        assert near(found.simulated[i], deployed) > (45 if half else 38)
        assert near(found.original[i], deployed) > 30
        assert near(found.original[i], stock[0][i]) > (40 if half else 36)
        assert near(found.original[i], stock[1][i]) > 30


@pytest.mark.parametrize(
    ("trunk", "head", "types"),
    [
        (torch.float16, torch.float32, {0, 1}),
        (torch.float32, torch.bfloat16, {0}),
        (torch.bfloat16, torch.float16, {0, 1}),
    ],
    ids=str,
)
def test_each_layer_keeps_its_own_type(
    trunk: torch.dtype,
    head: torch.dtype,
    types: set[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 12, 12),) for _ in range(3)]
    model = trained_like(Mixed(torch.float32, torch.float32), batches[0])
    model.conv.to(trunk)
    model.head.to(head)
    model.types = trunk, head
    found = Flow(model, batches)
    assert dequant_types() == types
    found.check_same_integers()
    assert found.simulated[0].dtype == head
    assert near(found.original[0], found.deployed()[0]) > 35
    assert near(found.original[0], found.stock("qdq.onnx")[0]) > 35


@pytest.mark.parametrize(
    ("build", "shape"), [(WithAutocast, (4, 3, 12, 12)), (ComputedUnderAutocast, (256, 8))]
)
def test_a_region_under_autocast_is_exported_in_the_precision_of_its_parameters(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = flow(build, (shape,), torch.float32)
    assert len(found.session.layers) == 3
    assert dequant_types() == {0}
    found.check_same_integers()
    assert near(found.original[0], found.deployed()[0]) > 35
    assert near(found.simulated[0], found.deployed()[0]) > 35


def test_autocast_itself_is_as_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = AutocastJoinsTypes().eval(), torch.randn(1, 3, 8, 8)
    amct.create_quant_config("config.json", model, x)
    with pytest.raises(ExportError, match=r"its own torch\.autocast regions"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, x)
    assert not Path("m.onnx").exists()
    with torch.autocast("cpu", torch.bfloat16):
        assert (x.flatten(1) @ x.flatten(1).T).dtype == torch.bfloat16
