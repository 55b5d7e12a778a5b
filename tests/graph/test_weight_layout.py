"""Rows of weights by output channel, for every layout and both array libraries."""

import numpy as np
import pytest
import torch
from torch import nn

from amct_pytorch.graph.weight_layout import WeightLayout


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_a_transposed_convolution_are_what_its_channels_use(groups):
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(8, 12, 3, groups=groups, bias=False)
    layout = WeightLayout(1, groups)
    assert layout.channels(tuple(conv.weight.shape)) == 12
    # Scaling the weights of one output channel scales that channel of the output and no other.
    x, factor = torch.randn(1, 8, 5, 5), torch.arange(1.0, 13.0)
    scaled = conv.weight * layout.along_channels(factor, tuple(conv.weight.shape))
    with torch.no_grad():
        want = conv(x) * factor.view(1, -1, 1, 1)
        conv.weight.copy_(scaled)
        torch.testing.assert_close(conv(x), want)
    assert layout.rows(scaled.detach()).shape == (12, 8 // groups * 9)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4, 3, 3), WeightLayout(0)),
        ((4, 6), WeightLayout(1)),
        ((4, 3, 2, 2), WeightLayout(1, 2)),
        ((4, 2, 2, 2, 3), WeightLayout(0)),
    ],
)
def test_numpy_and_torch_agree_and_rows_fit_along_channels(shape, layout):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows = layout.rows(weight)
    assert np.array_equal(rows, layout.rows(torch.from_numpy(weight)).numpy())
    largest = np.abs(rows).max(1)
    spread = layout.along_channels(largest, shape)
    assert np.array_equal(spread, layout.along_channels(torch.from_numpy(largest), shape).numpy())
    # Each weight is at most its own channel's largest, and each channel reaches it once.
    assert (np.abs(weight) <= spread).all()
    assert (np.abs(weight) == spread).sum() == layout.channels(shape)
    assert layout.along_channels(largest[:1], shape).size == 1
