"""Copies for one run share weights and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from amct_pytorch.graph.look import copy_sharing_weights


def test_a_copy_for_one_run_shares_parameters_and_owns_its_buffers():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copied = copy_sharing_weights(model)
    assert copied[0] is not model[0]
    assert copied[0].weight is model[0].weight
    copied(torch.randn(4, 1, 3, 3) + 5)  # in training mode: the statistics change
    assert not torch.equal(copied[1].running_mean, before["1.running_mean"])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
