"""Sensitivities and search algorithms of the user's own, as documented."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from search_networks import complexity, data, prune, search, small, widths

from amct_pytorch.common.auto_channel_prune import SearchChannelBase as FromPackage
from amct_pytorch.common.auto_channel_prune.search_channel_base import SearchChannelBase
from amct_pytorch.common.auto_channel_prune.sensitivity_base import SensitivityBase
from amct_pytorch.errors import ModelError
from amct_pytorch.proto import AttrProto


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class WeightNorm(SensitivityBase):
    """The L2 norm of each channel's weights; needs no data."""

    def setup_initialization(self, graph_tuple, input_data, test_iteration):
        self.graph, self.info = graph_tuple
        self.given = (input_data, test_iteration)

    def get_sensitivity(self, search_records):
        for record in search_records:
            for producer in record.producer:
                weight = self.graph.model.get_submodule(producer.name).weight
                norms = weight.detach().flatten(1).norm(dim=1).tolist()
                producer.attr.add(name="sensitivity", type=AttrProto.FLOATS).floats.extend(norms)


class Halves(SearchChannelBase):
    """Keeps the better half of every layer that makes channels alone."""

    def channel_prune_search(self, graph_info, search_records, prune_config):
        self.seen = (graph_info, list(search_records), prune_config)
        masks = {}
        for record in search_records:
            if len(record.producer) > 1:
                continue
            (producer,) = record.producer
            (values,) = (a.floats for a in producer.attr if a.name == "sensitivity")
            order = np.argsort(values)
            mask = np.ones(len(values), dtype=int)
            mask[order[: len(values) // 2]] = 0
            masks[producer.name] = mask.tolist()
        return masks


def test_classes_of_the_users_own():
    model, given = small(), data()
    rates, searches = WeightNorm(), Halves()
    search(
        model,
        "compress_ratio: 1.3 ascend_optimized: false test_iteration: 5",
        given,
        sensitivity=rates,
        search_alg=searches,
    )
    assert FromPackage is SearchChannelBase
    assert rates.given[0] is given
    assert rates.given[1] == 5
    assert rates.graph.model is not model
    info, records, target = searches.seen
    assert info is rates.info
    assert target == (pytest.approx(1.3), False, 1.0)
    assert set(info["a"]) == {"cin", "cout", "ori_cout", "bitops"}
    assert (info["a"]["cin"], info["a"]["cout"], info["a"]["ori_cout"]) == (32, 48, 48)
    assert info["a"]["bitops"] == 2 * 32 * 32 * 48 * 32 * 9 * 64
    assert sum(layer["bitops"] for layer in info.values()) == 2 * 32 * 32 * complexity(model)
    assert [node.name for node in records[0].producer] == ["stem", "b"]
    assert "norm" in [node.name for node in records[0].consumer]
    before, after = widths(model), widths(prune(model))
    for name in ("a", "left", "right", "hidden"):
        assert after[name] == before[name] // 2, name
    assert after["stem"] == before["stem"]
    assert after["depthwise"] == after["left"] + after["right"]
    ledger = json.loads(Path("found_ledger.json").read_text())
    assert (ledger["sensitivity"], ledger["search_alg"]) == ("WeightNorm", "Halves")


def test_one_class_of_the_users_own_with_a_built_in_one():
    model = small()
    search(model, "compress_ratio: 1.5 ascend_optimized: false", sensitivity=WeightNorm())
    assert complexity(model) / complexity(prune(model)) == pytest.approx(1.5, rel=0.01)


def test_a_search_that_stops_short_is_told(caplog):
    class Nothing(SearchChannelBase):
        def channel_prune_search(self, graph_info, search_records, prune_config):
            return {}

    search(small(), "compress_ratio: 1.5 ascend_optimized: false", search_alg=Nothing())
    assert "reached compress_ratio 1, less than the 1.5 asked for" in caplog.text


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ([1, 0], "returned a list; needed is a dict"),
        ({"stemm": [1]}, "which is no layer that is searched (did you mean 'stem'?)"),
        ({"head": [1] * 10}, "which is no layer that is searched"),
        ({"a": [1, 0]}, "a has 2 values"),
        ({"a": [2] * 48}, "needed are 48, 1 (keep) or 0 (prune)"),
        ({"a": [0] * 48}, "takes all 48 channels of a; one has to stay"),
    ],
)
def test_answers_that_do_not_fit(masks, said):
    class Wrong(SearchChannelBase):
        def channel_prune_search(self, graph_info, search_records, prune_config):
            return masks

    with pytest.raises(ModelError) as caught:
        search(small(), "compress_ratio: 1.5 ascend_optimized: false", search_alg=Wrong())
    assert said in str(caught.value)
    assert not Path("found.cfg").exists()


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [float("nan")] * 32])
def test_sensitivities_that_do_not_fit(values):
    class Wrong(WeightNorm):
        def get_sensitivity(self, search_records):
            super().get_sensitivity(search_records)
            attr = search_records[0].producer[0].attr[-1]
            del attr.floats[:]
            attr.floats.extend(values)

    with pytest.raises(ModelError, match="stem: its sensitivity has"):
        search(small(), "compress_ratio: 1.5 ascend_optimized: false", sensitivity=Wrong())


def test_a_mask_as_tensor_or_array():
    class Arrays(SearchChannelBase):
        def channel_prune_search(self, graph_info, search_records, prune_config):
            return {"a": np.arange(48) % 2, "hidden": torch.arange(64) % 4 > 0}

    model = small()
    search(model, "compress_ratio: 1.2 ascend_optimized: false", search_alg=Arrays())
    after = widths(prune(model))
    assert (after["a"], after["hidden"]) == (24, 48)
