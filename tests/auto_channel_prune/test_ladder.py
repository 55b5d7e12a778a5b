"""What the steps of a search cost, and that no layer is cut to a thread while others are whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from search_networks import prune, search, widths
from torch import nn

from amct_pytorch.auto_channel_prune.ladder import Ladder
from amct_pytorch.common.auto_channel_prune.sensitivity_base import SensitivityBase
from amct_pytorch.proto import PruneRecord
from amct_pytorch.record.attributes import set_floats, set_ints


class Equal(SensitivityBase):
    """Every channel of every layer counts the same."""

    def setup_initialization(self, graph_tuple, input_data, test_iteration):
        pass

    def get_sensitivity(self, search_records):
        for record in search_records:
            for producer in record.producer:
                (channels,) = (a.ints for a in producer.attr if a.name == "channels")
                set_floats(producer, "sensitivity", [1.0] * len(channels))


def record_of(sensitivity: list[float]) -> PruneRecord:
    record = PruneRecord()
    node = record.producer.add(name="a")
    set_ints(node, "channels", list(range(len(sensitivity))))
    set_floats(node, "sensitivity", sensitivity)
    return record


def test_a_step_costs_more_the_fewer_channels_are_left():
    one_by_one = Ladder.of(record_of([3.0] * 8), False, 1.0)
    assert np.all(np.diff(one_by_one.costs) > 0)
    # 8 / (8 · 7) of 8 channels for the first one.
    assert one_by_one.costs[0] == pytest.approx(3 * 64 / 56)
    assert len(one_by_one.costs) == 7


def test_blocks_cost_what_their_channels_cost_one_by_one():
    # Of equal channels it makes no difference in how many steps they go.
    whole = Ladder.of(record_of([1.0] * 48), False, 1.0)
    blocks = Ladder.of(record_of([1.0] * 48), True, 1.0)
    assert [len(step) for step in blocks.steps] == [16, 16]
    assert sum(whole.costs[:16]) == pytest.approx(blocks.costs[0])
    assert sum(whole.costs[16:32]) == pytest.approx(blocks.costs[1])


def test_of_equal_channels_every_layer_loses_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 4, 3, padding=1),
    ).eval()  # fmt: skip
    given = [torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)]
    text = "compress_ratio: 3 ascend_optimized: false"
    search(model, text, given, sensitivity=Equal())
    left = widths(prune(model))
    shares = [left[name] / number for name, number in (("0", 64), ("2", 64), ("4", 32))]
    assert min(shares) > 0.3
    assert max(shares) < 1
