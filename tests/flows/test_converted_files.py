"""save_converted and load_converted."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import amct_pytorch as amct
from amct_pytorch.errors import ArgumentTypeError, FileAccessError, FileMissingError, ModelError
from amct_pytorch.low_bit.deploy_linear import LowBitLinear

NETWORK = '''
import torch
from torch import nn

class Tied(nn.Module):
    """Embedding and head share a weight; the body is quantized, with one layer in two places."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.again = self.up
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(x)) + self.again(x))
        return self.lm_head(self.norm(x))
'''
exec(NETWORK)
Tied = globals()["Tied"]

IN_NEW_PROCESS = """
import sys
import amct_pytorch as amct
torch.set_num_threads(1)
torch.manual_seed(99)  # other weights than those that were saved
net = amct.load_converted(Tied(), sys.argv[1])
tokens = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save([net(tokens), net.lm_head.weight is net.embed.weight, net.again is net.up],
               sys.argv[3])
"""
BLOCK = {"type": "int8", "strategy": "token"}
CONFIGS = {
    "int4 group": {"weights": {"type": "int4", "symmetric": False, "strategy": "group",
                               "group_size": 32}},
    "int8": {"weights": {"type": "int8"}},
    "int8 static": {"weights": {"type": "int8"},
                    "inputs": {"type": "int8", "symmetric": False, "strategy": "tensor"}},
    "mxfp4": {"weights": {"type": "mxfp4_e2m1"}},
    "hifloat8": {"weights": {"type": "hifloat8"}, "inputs": {"type": "hifloat8"}},
}  # fmt: skip
ALGORITHMS = {"mxfp4": "mxquant", "hifloat8": "ofmr", "int4 group": "awq"}


def converted(name="int8"):
    torch.manual_seed(1)
    net = Tied().eval()
    tokens = torch.randint(50, (2, 12))
    algorithm = ALGORITHMS.get(name, "minmax")
    amct.quantize(
        net, {"quant_cfg": CONFIGS[name], "algorithm": algorithm, "skip_layers": "lm_head"}
    )
    with torch.no_grad():
        # The layer in two places is called twice a pass.
        net(tokens)
        return amct.convert(net), tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logits_in_a_new_process(tmp_path, name):
    net, tokens = converted(name)
    amct.save_converted(net, tmp_path / "net.safetensors")
    torch.save(tokens, tmp_path / "tokens.pt")
    files = [str(tmp_path / name) for name in ("net.safetensors", "tokens.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", NETWORK + IN_NEW_PROCESS, *files], check=True)
    with torch.no_grad():
        meant = net(tokens)
    found, tied, shared = torch.load(files[2])
    assert torch.equal(found, meant)
    assert tied and shared


def test_the_file_is_plain_safetensors_without_repetition(tmp_path):
    net, _ = converted()
    amct.save_converted(net, tmp_path / "net.safetensors")
    tensors = load_file(tmp_path / "net.safetensors")
    state = net.state_dict()
    assert set(state) - set(tensors) == {
        "lm_head.weight", *(name for name in state if name.startswith("again.")),
    }  # fmt: skip
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name])
    assert tensors["up.packed"].dtype == torch.int8


def test_the_ledger_is_kept(tmp_path):
    net, _ = converted("int4 group")
    amct.save_converted(net, tmp_path / "net.safetensors")
    again = amct.load_converted(Tied(), tmp_path / "net.safetensors")
    assert again.amct_ledger == net.amct_ledger
    assert {entry.status for entry in again.amct_ledger.quantized} == {"deployed"}


def test_no_float_weights_are_needed(tmp_path):
    net, tokens = converted("int4 group")
    amct.save_converted(net, tmp_path / "net.safetensors")
    with torch.device("meta"):
        empty = Tied()
    loaded = amct.load_converted(empty, tmp_path / "net.safetensors")
    assert not any(t.is_meta for t in loaded.state_dict().values())
    with torch.no_grad():
        assert torch.equal(loaded(tokens), net(tokens))


def test_convolutions(tmp_path):
    def network():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)
        ).eval()

    net, x = network(), torch.randn(2, 3, 9, 9)
    amct.quantize(net, amct.HIFP8_OFMR_CFG)
    with torch.no_grad():
        net(x)
        meant = amct.convert(net)(x)
        amct.save_converted(net, tmp_path / "net.safetensors")
        loaded = amct.load_converted(network(), tmp_path / "net.safetensors")
        assert torch.equal(loaded(x), meant)
    other = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    with pytest.raises(ModelError, match=r"0: the model has Conv2d\(3, 8.*'stride': \[2, 2\]"):
        amct.load_converted(other, tmp_path / "net.safetensors")


class Narrow(Tied):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)


class Renamed(Tied):
    def __init__(self):
        super().__init__()
        self.down_proj = self.down
        del self.down


class Larger(Tied):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(51, 64)
        self.extra = nn.LayerNorm(3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Narrow, r"up: the model has Linear\(in_features=64, out_features=96"),
        (Renamed, "down: the model has no such layer .did you mean 'down_proj'"),
        (Larger, r"embed.weight has shape \[50, 64\]; the model's is \[51, 64\](.|\n)*"
                 "extra.weight is missing in the file"),
    ],
)  # fmt: skip
def test_another_structure_is_told_and_left_alone(tmp_path, other, message):
    net, _ = converted()
    amct.save_converted(net, tmp_path / "net.safetensors")
    model = other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        amct.load_converted(model, tmp_path / "net.safetensors")
    assert not any(isinstance(module, LowBitLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items())


def test_spoiled_files_are_told(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileMissingError, match="does not exist"):
        amct.load_converted(Tied(), path)
    path.write_bytes(b"no header")
    with pytest.raises(ModelError, match="no sound safetensors file"):
        amct.load_converted(Tied(), path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ModelError, match="was not written by save_converted"):
        amct.load_converted(Tied(), path)

    net, _ = converted()
    amct.save_converted(net, path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    lacking = {name: tensor for name, tensor in tensors.items() if name != "up.scale"}
    save_file(lacking, path, {**metadata, "amct.tied": "{}"})
    with pytest.raises(ModelError, match=r"up\.scale is missing in the file"):
        amct.load_converted(Tied(), path)
    save_file({**tensors, "down.packed": tensors["down.packed"].float()}, path, metadata)
    with pytest.raises(ModelError, match=r"down\.packed is torch.float32; it must be torch.int8"):
        amct.load_converted(Tied(), path)
    layers = json.loads(metadata["amct.low_bit_layers"])
    del layers["up"]["weight"]
    save_file(tensors, path, {**metadata, "amct.low_bit_layers": json.dumps(layers)})
    with pytest.raises(ModelError, match="up: the model has Linear"):
        amct.load_converted(Tied(), path)


def test_files_have_the_permissions_of_others_and_errors_name_them(tmp_path, monkeypatch):
    net, _ = converted()
    path, other = tmp_path / "net.safetensors", tmp_path / "other"
    amct.save_converted(net, path)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    with pytest.raises(ModelError, match="up is converted already; give a float model"):
        amct.load_converted(net, path)
    with pytest.raises(FileAccessError, match="is a folder; allowed: a file"):
        amct.load_converted(Tied(), tmp_path)

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("amct_pytorch.flows.converted_files.save_file", full)
    with pytest.raises(FileAccessError, match=r"net\.safetensors': No space left"):
        amct.save_converted(net, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.safetensors", "other"]


def test_what_cannot_be_saved_is_told(tmp_path):
    with pytest.raises(ArgumentTypeError, match="model is of type int"):
        amct.save_converted(3, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match="no deploy layer"):
        amct.save_converted(Tied(), tmp_path / "net.safetensors")
    net = Tied()
    amct.quantize(net, {"quant_cfg": CONFIGS["int8"], "algorithm": "minmax"})
    with pytest.raises(ModelError, match="layer 'up' is being calibrated; call convert first"):
        amct.save_converted(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
