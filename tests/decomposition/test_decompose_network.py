"""The info file, and what decompose_network makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from split_networks import DECOMPOSED, Net, image, trained
from torch import nn

import amct_pytorch as amct

RESTORE = """
import sys, torch
from split_networks import Net, image
from amct_pytorch.tensor_decompose import decompose_network
net, changes = decompose_network(Net().eval(), "net.json")
net.load_state_dict(torch.load("net.pth", weights_only=True))
torch.save((changes, net(image())), "again.pth")
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("tucker", [False, True])
def test_a_fresh_process_rebuilds_the_model(tucker):
    net = trained()
    _, changes = amct.auto_decomposition(net, "net.json", tucker=tucker)
    torch.save(net.state_dict(), "net.pth")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(
        [sys.executable, "-c", RESTORE], check=True, env=os.environ | {"PYTHONPATH": path}
    )
    again = torch.load("again.pth", weights_only=True)
    assert again[0] == changes
    # Another process may have another number of threads, and so another order of sums.
    torch.testing.assert_close(again[1], net(image()), rtol=1e-4, atol=1e-5)


def test_the_file_is_as_documented():
    amct.auto_decomposition(trained(), "net.json")
    document = json.loads(Path("net.json").read_text())
    assert [layer["ori_layer_info"]["name"] for layer in document] == DECOMPOSED
    last = document[-1]
    assert last["ori_layer_info"] == {
        "name": "tail.7",
        "in_channels": 96,
        "out_channels": 80,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    assert last["mode"] in ("FCFK", "FCSK")
    rank = last["decom_nodes"]["first"]["weight_shape"][0]
    first, second = ([3, 1], [1, 3]) if last["mode"] == "FCFK" else ([1, 3], [3, 1])
    assert last["decom_nodes"] == {
        "first": {"weight_shape": [rank, 96, *first]},
        "last": {"weight_shape": [80, rank, *second]},
    }


def test_structure_dtype_training_flag_and_random_state_on_any_device():
    amct.auto_decomposition(trained(), "net.json")
    fresh = Net().half().train()
    state = torch.get_rng_state()
    net, _ = amct.decompose_network(fresh, "net.json")
    assert net is fresh
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float16}
    assert all(module.training for module in net.modules())
    with torch.device("meta"):
        meta = Net()
    amct.decompose_network(meta, "net.json")
    assert list(meta.state_dict()) == list(net.state_dict())


def test_shapes_of_the_file_are_followed_whatever_the_mode():
    """The other halves of the pairs are legal in files of other tools."""
    amct.auto_decomposition(trained(), "net.json", include="tail.7")
    (layer,) = json.loads(Path("net.json").read_text())
    layer["mode"] = "SCSK"
    layer["decom_nodes"] = {
        "first": {"weight_shape": [5, 96, 1, 3]},
        "last": {"weight_shape": [80, 5, 3, 1]},
    }
    Path("net.json").write_text(json.dumps([layer]))
    net, _ = amct.decompose_network(Net(), "net.json")
    assert [tuple(piece.weight.shape) for piece in net.tail[0]] == [(5, 96, 1, 3), (80, 5, 3, 1)]


def _edit(change) -> None:
    amct.auto_decomposition(trained(), "net.json", include="tail.7")
    document = json.loads(Path("net.json").read_text())
    change(document[0])
    Path("net.json").write_text(json.dumps(document))


def _set(*place, value):
    def change(layer):
        for key in place[:-1]:
            layer = layer[key]
        layer[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("ori_layer_info", "name", value="tail.8"), "no Conv2d 'tail.8'.*'tail.7'"),
        (_set("ori_layer_info", "name", value="norm"), "no Conv2d 'norm'"),
        (_set("ori_layer_info", "in_channels", value=95), "in_channels: 95, while .* has 96"),
        (_set("ori_layer_info", "stride", value=[2, 2]), r"stride: \[2, 2\], while"),
        (_set("ori_layer_info", "stride", value=2), "stride is 2; allowed: two integers"),
        (_set("mode", value="FCKF"), 'mode is "FCKF"; allowed: "FCFK".*\'FCSK\''),
        (_set("decom_nodes", "first", "weight_shape", value=[8, 96, 3]), "four integers"),
        (_set("decom_nodes", "first", "weight_shape", value=[8, 96, 3, 3]), "exactly one piece"),
        (_set("decom_nodes", "first", "weight_shape", value=[8, 96, 1, 1]), "exactly one|no piece"),
        (_set("decom_nodes", "first", "weight_shape", value=[8, 90, 3, 1]), "do not lead"),
        (_set("decom_nodes", "frist", value={}), "unknown key.*'first'"),
        (lambda layer: layer.pop("mode"), "mode"),
    ],
)
def test_wrong_files_are_explained(change, message):
    _edit(change)
    net = Net()
    before = list(net.state_dict())
    with pytest.raises(amct.AmctError, match=rf"(?s)net\.json: .*{message}"):
        amct.decompose_network(net, "net.json")
    assert list(net.state_dict()) == before


def test_missing_or_broken_files_are_explained():
    with pytest.raises(FileNotFoundError, match="decompose_info_path"):
        amct.decompose_network(Net(), "nowhere.json")
    Path("bad.json").write_text("[\n{]")
    with pytest.raises(amct.AmctError, match="line 2, column 2"):
        amct.decompose_network(Net(), "bad.json")
    Path("bad.json").write_text("{}")
    with pytest.raises(amct.AmctError, match="a list"):
        amct.decompose_network(Net(), "bad.json")
    Path("bad.json").write_text("[3]")
    with pytest.raises(amct.AmctError, match=r"\[0\]: 3; allowed: an object"):
        amct.decompose_network(Net(), "bad.json")
    with pytest.raises(TypeError, match="model is a int"):
        amct.decompose_network(3, "bad.json")


def test_a_decomposed_model_can_be_quantized_and_exported():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding="same", bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()
    _, changes = amct.auto_decomposition(net)
    assert list(changes) == ["3"]
    x = torch.randn(4, 3, 12, 12)
    amct.create_quant_config("config.json", net, x)
    assert {"3.0", "3.1"} <= set(json.loads(Path("config.json").read_text()))
    calibrated = amct.quantize_model("config.json", "float.onnx", "record.txt", net, x)
    with torch.no_grad():
        calibrated(x)
        simulated = calibrated(x)
        expected = net(x)
    amct.save_model("float.onnx", "record.txt", "out/net")
    assert 'key: "3.0"' in Path("record.txt").read_text()
    session = onnxruntime.InferenceSession("out/net_fake_quant_model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # The same integers; only float multiplications may be rounded otherwise.
    torch.testing.assert_close(torch.from_numpy(found), simulated, rtol=1e-4, atol=1e-5)
    assert (simulated - expected).norm() < 0.1 * expected.norm()
