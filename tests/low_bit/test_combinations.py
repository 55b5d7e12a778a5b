"""Every combination of formats, granularities and algorithms: allowed ones run, others are told.

ALLOWED is the table of the documentation, written out here by itself.
"""

import itertools

import pytest
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.errors import ConfigError
from amct_pytorch.low_bit.deploy_linear import LowBitLinear

SYM, BOTH = (True,), (True, False)
TC, TCG, TT = ("tensor", "channel"), ("tensor", "channel", "group"), ("tensor", "token")
# layer, inputs: (type, strategies, symmetric) or None, weights: the same, algorithms
ALLOWED = [
    ("Linear", ("hifloat8", TT, SYM), ("hifloat8", TC, SYM),
     ("ofmr", "cast", "quantile", "smoothquant")),
    ("Linear", ("float8_e4m3fn", TT, SYM), ("float8_e4m3fn", TC, SYM), ("ofmr",)),
    ("Linear", ("mxfp8_e4m3fn", ("group",), SYM), ("mxfp8_e4m3fn", ("group",), SYM), ("mxquant",)),
    ("Linear", ("float8_e4m3fn", ("tensor",), SYM), ("float4_e2m1", ("group",), SYM),
     ("minmax", "smoothquant")),
    ("Linear", ("int8", ("tensor",), BOTH), ("int8", TC, SYM), ("minmax", "smoothquant")),
    ("Linear", ("int8", ("token",), SYM), ("int8", TC, SYM), ("minmax", "smoothquant")),
    ("Linear", ("int8", ("tensor",), BOTH), ("int4", TCG, BOTH), ("minmax", "smoothquant")),
    ("Linear", ("int8", ("token",), SYM), ("int4", TCG, BOTH), ("minmax", "smoothquant")),
    ("Conv2d", ("hifloat8", ("tensor",), SYM), ("hifloat8", TC, SYM), ("ofmr",)),
    ("Conv2d", ("float8_e4m3fn", ("tensor",), SYM), ("float8_e4m3fn", TC, SYM), ("ofmr",)),
    ("Linear", None, ("hifloat8", TC, SYM), ("ofmr", "gptq", "cast", "quantile")),
    ("Linear", None, ("float8_e4m3fn", TC, SYM), ("ofmr", "gptq")),
    ("Linear", None, ("mxfp4_e2m1", ("group",), SYM), ("mxquant", "gptq", "awq")),
    ("Linear", None, ("float4_e2m1", ("group",), SYM), ("minmax", "gptq", "awq")),
    ("Linear", None, ("int8", TCG, BOTH), ("minmax", "gptq", "awq")),
    ("Linear", None, ("int4", TCG, BOTH), ("minmax", "gptq", "awq")),
]  # fmt: skip
FORMATS = ("hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn", "mxfp4_e2m1", "float4_e2m1", "int4", "int8")
INPUT_FORMATS = ("hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn", "int8")
ALGORITHMS = ("minmax", "awq", "gptq", "smoothquant", "ofmr", "mxquant", "cast", "quantile")


def expanded():
    """One entry for each allowed (layer, inputs, weights, algorithm)."""
    for layer, inputs, weights, algorithms in ALLOWED:
        spread_inputs = [None] if inputs is None else itertools.product((inputs[0],), *inputs[1:])
        spread_weights = itertools.product((weights[0],), *weights[1:])
        yield from itertools.product((layer,), spread_inputs, spread_weights, algorithms)


ALL = sorted(expanded(), key=str)


def block(found):
    fmt, strategy, symmetric = found
    size = {"group_size": 32} if strategy == "group" else {}
    return {"type": fmt, "strategy": strategy, "symmetric": symmetric, **size}


def config(inputs, weights, algorithm):
    blocks = {"weights": block(weights)} | ({} if inputs is None else {"inputs": block(inputs)})
    return {"quant_cfg": blocks, "algorithm": algorithm}


def network(layer):
    torch.manual_seed(0)
    if layer == "Conv2d":
        return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()).eval()
    return nn.Sequential(nn.Linear(128, 64, bias=False), nn.Tanh()).eval()


@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, case)))
def test_allowed_combinations_run_and_deploy_what_was_simulated(case):
    layer, inputs, weights, algorithm = case
    net = network(layer)
    x = torch.randn(3, 8, 5, 5) if layer == "Conv2d" else torch.randn(3, 5, 128)
    with torch.no_grad():
        meant = net(x)
        amct.quantize(net, config(inputs, weights, algorithm))
        assert torch.equal(net(x), meant)
        simulated = net(x)
        amct.convert(net)
        deployed = net(x)
    # Four bits leave 15 dB and more by group, 10 dB by tensor; eight bits 20 dB (hifloat8) to 40.
    error = float((deployed - meant).square().sum() / meant.square().sum())
    assert 0 < error < (0.1 if "4" in weights[0].split("_")[0][-1] else 0.01)
    if isinstance(net[0], LowBitLinear) and net[0].kernel != "reference":
        # Twice what inputs, scales and sums in bfloat16 may do to a sum of 128 products.
        assert float((deployed - simulated).abs().max()) < 0.05
    else:
        assert torch.equal(deployed, simulated)


def test_all_other_combinations_are_told_what_is_allowed():
    allowed, refused = set(ALL), 0
    networks = {layer: network(layer) for layer in ("Linear", "Conv2d")}
    every_input = [None, *itertools.product(INPUT_FORMATS, ("tensor", "token", "group"), BOTH)]
    every_weight = itertools.product(FORMATS, TCG, BOTH)
    for case in itertools.product(("Linear", "Conv2d"), every_input, every_weight, ALGORITHMS):
        if case in allowed:
            continue
        net = networks[case[0]]
        module = net[0]
        with pytest.raises(ConfigError, match=r"allowed|no layer is left to quantize"):
            amct.quantize(net, config(*case[1:]))
        assert net[0] is module
        refused += 1
    assert refused > 8000


def test_operands_may_lie_anywhere_in_memory():
    """torch's kernels end the process on operands that are not aligned, as in a mapped file."""
    for fmt in ("int8", "int4"):
        net = network("Linear")
        amct.quantize(net, config(None, (fmt, "channel", True), "minmax"))
        x = torch.randn(3, 128).bfloat16()
        with torch.no_grad():
            net(x.float())
            layer = amct.convert(net)[0]
            meant = layer(x)
            packed = layer.state_dict()["packed"]
            raw = torch.zeros(packed.numel() + 1, dtype=packed.dtype)
            raw[1:] = packed.flatten()
            shifted = {**layer.state_dict(), "packed": raw[1:].view(packed.shape)}
            layer.load_state_dict(shifted, assign=True)
            assert layer.packed.data_ptr() % 2 == 1
            row = torch.zeros(x.numel() + 1, dtype=x.dtype)
            row[1:] = x.flatten()
            assert torch.equal(layer(row[1:].view(x.shape)), meant)
        assert layer.kernel != "reference"
