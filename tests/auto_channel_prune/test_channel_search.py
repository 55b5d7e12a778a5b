"""The search for the share of each layer's channels: it arrives, and says when it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from search_networks import complexity, data, prune, search, small, widths
from torch import nn

import amct_pytorch as amct
from amct_pytorch.config.prune_search_cfg import exact_ratio
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    FileMissingError,
    ModelError,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("ratio", [1.25, 1.6, 2.0, 4.0])
def test_it_arrives_at_the_ratio_asked_for(ratio):
    model = small()
    text = search(model, f"compress_ratio: {ratio} ascend_optimized: false test_iteration: 4")
    pruned = prune(model)
    reached = complexity(model) / complexity(pruned)
    assert ratio * (1 - 1e-6) <= reached <= ratio * 1.01
    ledger = json.loads(Path("found_ledger.json").read_text())
    assert ledger["compress_ratio"][0] == ratio
    assert ledger["compress_ratio"][1] == pytest.approx(reached, rel=1e-9)
    assert f"{reached:.4g} reached" in text.splitlines()[0]
    counts = widths(pruned)
    for layer in ledger["layers"]:
        assert layer["channels"][1] == counts[layer["name"]], layer["name"]


def test_multiples_of_sixteen(caplog):
    model = small()
    search(model, "compress_ratio: 1.6 test_iteration: 2")
    pruned = prune(model)
    before, after = widths(model), widths(pruned)
    shrunk = [name for name in after if after[name] < before[name]]
    assert shrunk
    assert all(after[name] % 16 == 0 for name in shrunk if name != "depthwise")
    reached = complexity(model) / complexity(pruned)
    # Sixteen channels of this small network are up to a tenth of it.
    assert 1.6 <= reached <= 1.7


def test_no_step_more_than_needed():
    """Giving back the smallest step of any group misses the target."""
    model = small()
    text = search(model, "compress_ratio: 2 test_iteration: 2")
    ratios = dict(re.findall(r'layer_name: "(\w+)".*?prune_ratio: ([\d.]+)', text, re.DOTALL))
    groups = [("stem", "b"), ("a",), ("left",), ("right",), ("hidden",)]
    for group in groups:
        if group[0] not in ratios:
            continue
        more = text
        for name in group:
            kept = round(widths(model)[name] * (1 - float(ratios[name]))) + 16
            ratio = 1 - kept / widths(model)[name]
            if ratio <= 0.01:
                more = re.sub(
                    r"override_layer_configs \{\n  layer_name: \"" + name + r"\".*?\n\}\n",
                    "",
                    more,
                    flags=re.DOTALL,
                )
                more += f'regular_prune_skip_layers: "{name}"\n'
            else:
                more = re.sub(
                    rf'(layer_name: "{name}".*?prune_ratio: )[\d.]+',
                    rf"\g<1>{ratio:.4f}",
                    more,
                    flags=re.DOTALL,
                )
        Path("less.cfg").write_text(more)
        assert complexity(model) / complexity(prune(model, "less.cfg")) < 2, group


def test_a_list_of_pairs_and_the_users_model_stays_as_it_is():
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = data(4)
    pairs = [[images[i : i + 2], labels[i : i + 2]] for i in (0, 2)]
    state = torch.random.get_rng_state()
    search(model, "compress_ratio: 1.5 ascend_optimized: false test_iteration: 2", pairs)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_max_prune_ratio_holds_in_every_layer():
    model = small()
    search(
        model, "compress_ratio: 2 ascend_optimized: false max_prune_ratio: 0.4 test_iteration: 2"
    )
    before, after = widths(model), widths(prune(model))
    # The transposed convolution is not searched; the depthwise one follows.
    assert all(after[name] >= 0.6 * before[name] for name in before)


def test_channels_that_the_loss_does_not_depend_on_go_first():
    model = small()
    with torch.no_grad():
        model.a.weight[12:] = 0
        model.a.bias[12:] = 0
        model.b.weight[:, 12:] = 0
    search(model, "compress_ratio: 1.2 ascend_optimized: false test_iteration: 6")
    after = widths(prune(model))
    assert 12 <= after["a"] < 48
    assert after["stem"] == 32
    ledger = json.loads(Path("found_ledger.json").read_text())
    (entry,) = (layer for layer in ledger["layers"] if layer["name"] == "a")
    assert entry["sensitivity"][1] == 0.0 < entry["sensitivity"][0]


OVERRIDE = """
regular_prune_skip_layers: "right"
override_layer_configs { layer_name: "a" prune_config { filter_pruner {
  balanced_l2_norm_filter_prune { prune_ratio: 0.25 ascend_optimized: false } } } }
"""


def test_the_override_file_is_respected():
    model = small()
    Path("override.cfg").write_text(OVERRIDE)
    text = search(
        model,
        "compress_ratio: 1.5 ascend_optimized: false test_iteration: 2 "
        'override_prune_cfg: "override.cfg"',
    )
    after = widths(prune(model))
    assert after["right"] == 40
    assert after["a"] == 36
    assert complexity(model) / complexity(prune(model)) == pytest.approx(1.5, rel=0.01)
    assert text.count('layer_name: "a"') == 1
    ledger = json.loads(Path("found_ledger.json").read_text())
    status = {layer["name"]: (layer["status"], layer["reason"]) for layer in ledger["layers"]}
    assert status["a"] == ("fixed", None)
    assert status["right"] == ("left", "the config skips it")
    assert status["stem"] == ("searched", None)
    assert "depthwise" in status["depthwise"][1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prune_config { }", "prune_config is not allowed in an override_prune_cfg"),
        ('skip_layers: "stam"', "stam: the model has no such layer (did you mean 'stem'?)"),
        (OVERRIDE.replace("0.25", "1.5"), "prune_ratio is 1.5; allowed: a number in (0, 1)"),
    ],
)
def test_override_files_that_do_not_fit(text, said):
    Path("override.cfg").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        search(small(), 'compress_ratio: 1.5 override_prune_cfg: "override.cfg"')
    assert not Path("found.cfg").exists()


@pytest.mark.parametrize("ratio", ["1", "0.5", "100000", "-2"])
def test_ratios_that_cannot_be_reached(ratio):
    with pytest.raises(ConfigError) as caught:
        search(small(), f"compress_ratio: {ratio} max_prune_ratio: 0.5 ascend_optimized: false")
    found = re.search(r"the largest that can be reached is ([\d.]+)", str(caught.value))
    assert f"compress_ratio is {float(ratio):g}; " in str(caught.value)
    assert found
    assert not Path("found.cfg").exists()
    # What it says can be reached can.
    largest = float(found[1]) * 0.999
    search(small(), f"compress_ratio: {largest} max_prune_ratio: 0.5 ascend_optimized: false")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("compress_ratio: nan", "compress_ratio is nan"),
        ("compress_ratio: 2 max_prune_ratio: 0", "max_prune_ratio is 0.0; allowed: a number in"),
        ("compress_ratio: 2 max_prune_ratio: 1.5", "max_prune_ratio is 1.5; allowed"),
        ("compress_ratio: 2 test_iteration: 0", "test_iteration is 0; allowed: an integer >= 1"),
        ("max_prune_ratio: 0.5", "required, but missing: compress_ratio"),
        ("compress_ration: 2", "did you mean 'compress_ratio'?"),
    ],
)
def test_configs_with_values_out_of_range(text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        search(small(), text)


def test_a_missing_override_file():
    with pytest.raises(FileMissingError, match=r"override_prune_cfg: there is no file"):
        search(small(), 'compress_ratio: 2 override_prune_cfg: "nowhere.cfg"')


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(1, 3, 8, 8), "input_data is a tensor of shape [1, 3, 8, 8]; allowed are"),
        ([torch.zeros(1, 3, 8, 8)], "input_data is a list of 1 (Tensor, …); allowed are"),
        ([], "input_data is a list of 0"),
        ([["a", "b"]], "input_data is a list of 1 (list, …)"),
    ],
)
def test_input_data_of_another_form(given, said):
    with pytest.raises(ArgumentTypeError, match=re.escape(said)):
        search(small(), "compress_ratio: 2", given)


def test_too_little_input_data():
    images, labels = data(2)
    text = "compress_ratio: 2 test_iteration: 3"
    with pytest.raises(ArgumentValueError, match=r"data has 2 samples .*test_iteration is 3"):
        search(small(), text, [images, labels])
    with pytest.raises(ArgumentValueError, match="has 2 pairs; test_iteration is 3"):
        search(small(), text, [[images, labels]] * 2)


def test_labels_that_do_not_fit_the_output():
    images, labels = data(3)
    with pytest.raises(ArgumentValueError) as caught:
        search(small(), "compress_ratio: 2 test_iteration: 3", [images, labels.argmax(1)])
    assert "label of iteration 0 has shape [1] and the model's output [1, 10]" in str(caught.value)
    with pytest.raises(ArgumentValueError, match=r"shape \[1, 7\]"):
        search(small(), "compress_ratio: 2", [images, labels[:, :7]])


@pytest.mark.parametrize(
    ("plugins", "error", "said"),
    [
        ({"sensitivity": "TaylorLoss"}, ArgumentValueError, "did you mean 'TaylorLossSensitivity'"),
        ({"search_alg": "Greedy"}, ArgumentValueError, "allowed: 'GreedySearch', or an instance"),
        ({"search_alg": nn.ReLU()}, ArgumentTypeError, "an instance of a SearchChannelBase"),
    ],
)
def test_unknown_plugins(plugins, error, said):
    with pytest.raises(error, match=re.escape(said)):
        search(small(), "compress_ratio: 2", **plugins)


def test_a_loss_that_is_no_number():
    images, labels = data(2)
    labels[0, 0] = float("nan")
    with pytest.raises(ModelError, match="the loss on input_data is nan"):
        search(small(), "compress_ratio: 1.5 ascend_optimized: false", [images, labels])


def test_a_ratio_gives_back_the_count_it_was_made_of():
    for number in (1, 2, 3, 7, 20, 96, 511, 2048, 18432):
        for gone in {1, 2, number // 3, number // 2, number - 1} - {0, number}:
            ratio = exact_ratio(gone, number)
            assert number - round(number * float(np.float32(ratio))) == number - gone


def test_the_ledger_tells_what_the_channels_are_worth():
    search(small(), "compress_ratio: 2 ascend_optimized: false test_iteration: 2")
    ledger = json.loads(Path("found_ledger.json").read_text())
    layers = {layer["name"]: layer for layer in ledger["layers"]}
    assert ledger["sensitivity"] == "TaylorLossSensitivity"
    assert ledger["largest_ratio"] > 2
    kept, gone = layers["a"]["sensitivity"]
    assert kept > 0
    assert gone >= 0
    assert layers["head"]["sensitivity"] is None
    assert sum(x["bitops"][0] for x in layers.values()) == 2 * 32 * 32 * complexity(small())
    drawn = [node["name"] for node in ledger["network"]["nodes"] if node["kind"] == "layer"]
    assert drawn == list(layers)


def test_it_is_public():
    assert amct.auto_channel_prune_search.__name__ in amct.__all__
