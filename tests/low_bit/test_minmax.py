"""MIN-MAX against its definition, computed here with numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import amct_pytorch as amct


def rounded_by_definition(w, bits, symmetric):
    """Codes and numbers of rows of float64, by the extremes of each row."""
    low, high = 2.0 ** (bits - 1), 2.0 ** (bits - 1) - 1
    lo, hi = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    if symmetric:
        scale = np.where(hi >= -lo, hi / high, -lo / low)
        offset = np.zeros_like(scale)
    else:
        scale = (hi - lo) / (2.0**bits - 1)
        offset = -np.round(lo / scale) - low
    scale, offset = scale.astype(np.float32)[:, None], offset[:, None]
    codes = np.clip(np.round(w / scale) + offset, -low, high)
    return codes, (codes - offset) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_weights(bits, symmetric, strategy):
    torch.manual_seed(4)
    layer = nn.Linear(96, 64, bias=False)
    with torch.no_grad():
        layer.weight[3] *= 5
        layer.weight += 0.05
    weight = layer.weight.detach().double().numpy()
    net = nn.Sequential(layer)
    size = {"group_size": 32} if strategy == "group" else {}
    weights = {"type": f"int{bits}", "strategy": strategy, "symmetric": symmetric, **size}
    amct.quantize(net, {"quant_cfg": {"weights": weights}, "algorithm": "minmax"})
    net(torch.randn(2, 96))
    amct.convert(net)
    rows = {"tensor": (1, -1), "channel": (64, -1), "group": (64 * 3, -1)}[strategy]
    codes, numbers = rounded_by_definition(weight.reshape(rows), bits, symmetric)
    found = net[0].codes().double().numpy()
    # A quotient within float32's precision of a half may fall to either side.
    differing = (found != codes.reshape(64, 96)).mean()
    assert differing < 0.002
    step = np.abs(numbers).max() / 2 ** (bits - 2)
    assert np.abs(net[0].weight.double().numpy() - numbers.reshape(64, 96)).max() < step


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_inputs_are_quantized_over_the_range_of_all_batches(symmetric):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(32, 16))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    blocks = {
        "weights": {"type": "int8"},
        "inputs": {"type": "int8", "strategy": "tensor", "symmetric": symmetric},
    }
    amct.quantize(net, {"batch_num": 2, "quant_cfg": blocks, "algorithm": "minmax"})
    first, second = torch.rand(4, 32) * 3 - 0.5, torch.rand(4, 32) * 2 - 1
    with torch.no_grad():
        net(first), net(second)
        amct.convert(net)
        found = net(first)
    lo, hi = -1.0, 3.0
    both = torch.cat([first, second])
    lo, hi = min(float(both.min()), 0.0), max(float(both.max()), 0.0)
    scale = np.float32(max(hi / 127, -lo / 128) if symmetric else (hi - lo) / 255)
    offset = 0 if symmetric else -round(lo / float(scale)) - 128
    assert float(net[0].input_scale) == pytest.approx(float(scale), rel=1e-6)
    if not symmetric:
        assert int(net[0].input_offset) == offset
    codes, _ = rounded_by_definition(weight.double().numpy(), 8, True)
    w_scale = net[0].scale.double().view(-1)
    x_codes = torch.clamp(torch.round(first / float(scale)) + offset, -128, 127) - offset
    units = (bias.double() / (w_scale * float(scale))).round()
    sums = x_codes.double() @ torch.from_numpy(codes).T + units
    # float32 results of exact integer sums.
    torch.testing.assert_close(found.double(), sums * w_scale * float(scale), rtol=1e-6, atol=1e-6)


def test_inputs_by_token_have_a_scale_each():
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(32, 16, bias=False))
    blocks = {"weights": {"type": "int8"}, "inputs": {"type": "int8", "strategy": "token"}}
    amct.quantize(net, {"quant_cfg": blocks, "algorithm": "minmax"})
    x = torch.randn(5, 32) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    with torch.no_grad():
        net(x)
        amct.convert(net)
        found = net(x)
        meant = net[0].weight @ x.T
    largest = x.abs().amax(1)
    # 32 products, each with half a step of the token's own scale; 0.2: the largest weight.
    assert bool(((found - meant.T).abs() <= 32 * 0.2 * largest[:, None] / 127 / 2 + 1e-9).all())
    assert bool((found[3] == 0).all())
