"""Sparsity and quantization-aware training together, through the three public calls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import amct_pytorch as amct
from amct_pytorch.errors import ConfigError, ModelError, RecordError
from amct_pytorch.record.record_file import read_record

TWO_OF_FOUR = "prune_config { n_out_of_m_pruner { l1_selective_prune { update_freq: 2 } } }"
CHANNELS = (
    "prune_config { filter_pruner { balanced_l2_norm_filter_prune "
    "{ prune_ratio: 0.5 ascend_optimized: false } } }"
)
QUANTIZED = """
retrain_data_quant_config { ulq_quantize { } }
retrain_weight_quant_config { arq_retrain { channel_wise: true } }
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.block(x))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


LAYERS = ["stem", "block", "up", "head"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def images(number=4):
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def network():
    torch.manual_seed(3)
    return Net().eval()


def create(model, text):
    Path("compress.cfg").write_text(text)
    return amct.create_compressed_retrain_model(model, images(), "compress.cfg", "record.txt")


def train(model, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(images() + step / 10).square().mean().backward()
        optimizer.step()
    model.eval()
    return optimizer


def save(model):
    amct.save_compressed_retrain_model(
        model, "record.txt", "out/net", images(), ["x"], ["y"], {"x": {0: "n"}}
    )


def evaluate(model, x):
    with torch.no_grad():
        return model.eval()(x).numpy()


def weights(path):
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name: held[f"{name}.weight"] for name in LAYERS}


def pruned_by(record):
    """How many channels each layer of a record loses."""
    return {
        node.name: len(attr.ints)
        for entry in record.message.prune_record
        for node in entry.producer
        for attr in node.attr
        if attr.name == "prune_index"
    }


def check_files(model):
    """Both files answer what the model in eval mode does."""
    x, deploy = images(6), "out/net_deploy_model.onnx"
    expected = evaluate(model, x)
    fake = onnxruntime.InferenceSession("out/net_fake_quant_model.onnx")
    # The same integers; only the last float multiplications may be rounded otherwise.
    np.testing.assert_allclose(fake.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-6)
    found = amct.DeploySession(deploy).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_two_of_four_then_int8_zeros_stay_zero():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressed = create(model, TWO_OF_FOUR + QUANTIZED)
    train(compressed, 5)
    save(compressed)
    check_files(compressed)
    stored = weights("out/net_deploy_model.onnx")
    for name, weight in stored.items():
        assert weight.dtype == np.int8
        # Along the input channels: axis 0 of a transposed convolution and of a Gemm.
        moved = weight if name in ("up", "head") else weight.swapaxes(0, 1)
        padded = np.pad(moved, [(0, -len(moved) % 4)] + [(0, 0)] * (moved.ndim - 1))
        fours = padded.reshape(-1, 4, *moved.shape[1:])
        assert ((fours != 0).sum(1) <= 2).all(), name
    record = read_record("record.txt")
    assert list(record.factors) == LAYERS
    assert all(factors.complete for factors in record.factors.values())
    assert [entry.selective_prune.name for entry in record.message.prune_record] == LAYERS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ledger = json.loads(Path("out/net_ledger.json").read_text())
    notes = {entry["name"]: entry["notes"] for entry in ledger["layers"]}
    assert "2:4 sparse: 1152 of 2304 weights kept" in notes["block"]
    assert ledger["flow"] == "save_compressed_retrain_model"
    train(compressed, 1)  # it can go on


def test_channels_then_int8():
    model = network()
    compressed = create(model, CHANNELS + QUANTIZED)
    train(compressed, 3)
    save(compressed)
    check_files(compressed)
    stored = weights("out/net_deploy_model.onnx")
    assert stored["stem"].shape == (8, 3, 3, 3)
    assert stored["block"].shape == (8, 8, 3, 3)
    assert all(weight.dtype == np.int8 for weight in stored.values())
    record = read_record("record.txt")
    assert list(record.factors) == LAYERS
    assert pruned_by(record) == {"stem": 8, "block": 8}
    ledger = json.loads(Path("out/net_ledger.json").read_text())
    notes = {entry["name"]: entry["notes"] for entry in ledger["layers"]}
    assert "8 of 16 output channels kept" in notes["stem"]
    assert any(text.startswith("channels pruned: parameters") for text in ledger["notes"])


@pytest.mark.parametrize("text", [TWO_OF_FOUR, CHANNELS])
def test_sparsity_alone_makes_two_equal_files(text):
    compressed = create(network(), text)
    train(compressed, 2)
    save(compressed)
    fake, deploy = (Path(f"out/net_{kind}_model.onnx") for kind in ("fake_quant", "deploy"))
    assert fake.read_bytes() == deploy.read_bytes()
    session = onnxruntime.InferenceSession(deploy)
    found = session.run(None, {"x": images(6).numpy()})[0]
    np.testing.assert_allclose(found, evaluate(compressed, images(6)), rtol=1e-4, atol=1e-6)
    record = read_record("record.txt")
    assert not record.factors
    assert record.message.prune_record


def test_quantization_alone():
    compressed = create(network(), QUANTIZED)
    train(compressed, 2)
    save(compressed)
    check_files(compressed)
    record = read_record("record.txt")
    assert list(record.factors) == LAYERS
    assert not record.message.prune_record


@pytest.mark.parametrize("text", [TWO_OF_FOUR + QUANTIZED, CHANNELS + QUANTIZED, TWO_OF_FOUR])
def test_restored_training_goes_on_exactly(text, caplog):
    model = network()
    compressed = create(model, text)
    optimizer = train(compressed, 3)
    torch.save({"net": compressed.state_dict(), "sgd": optimizer.state_dict()}, "state.pth")
    restored = amct.restore_compressed_retrain_model(
        model, images(), "compress.cfg", "record.txt", "state.pth", "net"
    )
    assert "overwrote" not in caplog.text  # it goes on with its own record
    again = torch.optim.SGD(restored.parameters(), 0.05, momentum=0.9)
    again.load_state_dict(torch.load("state.pth", weights_only=True)["sgd"])
    train(compressed, 3, optimizer)
    train(restored, 3, again)
    assert np.array_equal(evaluate(compressed, images(6)), evaluate(restored, images(6)))
    for name, value in compressed.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def test_the_record_keeps_both_parts_through_inference():
    compressed = create(network(), CHANNELS + QUANTIZED)
    train(compressed, 2)
    evaluate(compressed, images())
    record = read_record("record.txt")
    assert all(factors.complete for factors in record.factors.values())
    assert pruned_by(record) == {"stem": 8, "block": 8}


def test_skip_lists_are_of_one_feature_or_of_both():
    compressed = create(
        network(),
        TWO_OF_FOUR
        + QUANTIZED
        + 'skip_layers: "stem" regular_prune_skip_layers: "up" quant_skip_layers: "head"',
    )
    train(compressed, 2)
    save(compressed)
    stored = weights("out/net_deploy_model.onnx")
    zeros = {name: float((weight == 0).mean()) for name, weight in stored.items()}
    assert {name: weight.dtype for name, weight in stored.items()} == {
        "stem": np.float32,
        "block": np.int8,
        "up": np.int8,
        "head": np.float32,
    }
    assert zeros["block"] >= 0.5
    assert zeros["head"] == 0.5
    assert zeros["stem"] == 0
    assert zeros["up"] < 0.1
    ledger = json.loads(Path("out/net_ledger.json").read_text())
    reasons = {entry["name"]: entry["reason"] for entry in ledger["layers"]}
    assert reasons["stem"] == reasons["head"] == "the config skips it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_num: 2", "it asks for nothing: prune_config, retrain_data_quant_config and"),
        (
            'override_layer_configs { layer_name: "up" ' + CHANNELS + " }",
            "it has only overrides",
        ),
        (CHANNELS + ' override_layer_configs { layer_name: "stem" ' + TWO_OF_FOUR + " }", "one"),
    ],
)
def test_configs_that_ask_for_nothing_or_too_much(text, said):
    with pytest.raises(ConfigError) as caught:
        create(network(), text)
    assert said in str(caught.value)
    assert not Path("record.txt").exists()


def test_overrides_for_pruning_without_pruning_are_told(caplog):
    create(network(), QUANTIZED + 'override_layer_configs { layer_name: "stem" ' + CHANNELS + " }")
    assert "override_layer_configs[stem].prune_config has no effect" in caplog.text


def test_a_record_of_the_other_kind_of_sparsity():
    model = network()
    torch.save(create(model, CHANNELS).state_dict(), "state.pth")
    Path("compress.cfg").write_text(TWO_OF_FOUR)
    with pytest.raises(RecordError, match="asks for n_out_of_m_pruner"):
        amct.restore_compressed_retrain_model(
            model, images(), "compress.cfg", "record.txt", "state.pth"
        )


def test_a_model_that_was_not_created_here():
    with pytest.raises(ModelError, match="create_compressed_retrain_model"):
        save(network())
    assert not Path("out").exists()


def sparse_network():
    Path("sparse.cfg").write_text(TWO_OF_FOUR)
    return amct.create_prune_retrain_model(network(), images(), "sparse.cfg", "sparse.txt")


@pytest.mark.parametrize("wanted", [TWO_OF_FOUR, CHANNELS, TWO_OF_FOUR + QUANTIZED])
def test_what_is_sparse_or_in_training_already_is_not_made_sparse(wanted):
    Path("c.cfg").write_text(wanted)
    create = amct.create_compressed_retrain_model
    with pytest.raises(
        ModelError, match=r"2:4 sparse already \(stem first\); give the dense model"
    ):
        create(sparse_network(), images(), "c.cfg", "r.txt")
    Path("q.cfg").write_text(QUANTIZED)
    training = create(network(), images(), "q.cfg", "q.txt")
    with pytest.raises(ModelError, match="in quantization-aware training already"):
        amct.create_prune_retrain_model(training, images(), "c.cfg", "r.txt")
    assert not Path("r.txt").exists()


def test_a_quantized_model_is_not_saved_as_a_sparse_one():
    Path("c.cfg").write_text(TWO_OF_FOUR + QUANTIZED)
    model = amct.create_compressed_retrain_model(network(), images(), "c.cfg", "r.txt")
    with pytest.raises(ModelError, match="give it to save_compressed_retrain_model"):
        amct.save_prune_retrain_model(model, "net", images())
    assert not list(Path().glob("net*"))


def test_a_record_where_the_save_path_should_be_is_refused():
    Path("c.cfg").write_text(TWO_OF_FOUR)
    model = amct.create_compressed_retrain_model(network(), images(), "c.cfg", "r.txt")
    before = Path("r.txt").read_bytes()
    with pytest.raises(amct.AmctError, match=r"save_path is .r\.txt., a file that exists"):
        amct.save_compressed_retrain_model(model, "net", "r.txt", images())
    assert Path("r.txt").read_bytes() == before
    assert not list(Path().glob("*net*")) and not list(Path().glob("*.onnx"))


def test_a_sparse_deploy_model_has_nothing_for_qdq():
    amct.save_prune_retrain_model(sparse_network(), "net", images())
    with pytest.raises(amct.AmctError, match="no layer of the model is quantized"):
        amct.deploy_to_qdq("net_deploy_model.onnx", "qdq.onnx")
    assert not Path("qdq.onnx").exists()
