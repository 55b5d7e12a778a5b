"""Input factors of layers: shared where an input is, moved to what makes it where that is exact.

`Exact` keeps its weights in float, so a model whose factors have been moved must compute what it
did before, to rounding.
"""

import copy
import re

import balanced_networks as nets
import pytest
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.algorithms.sharing import InputStatistics
from amct_pytorch.errors import CalibrationError
from amct_pytorch.flows.factor_watch import FactorWatch
from amct_pytorch.low_bit.balanced import Balance, BalancedLinear
from amct_pytorch.low_bit.registry import REGISTRY
from amct_pytorch.low_bit.solution import LinearSolution

WIDTH = nets.WIDTH
# Of products in float32 in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


class Divided(nn.Module):
    def __init__(self, weight, bias, divisor):
        super().__init__()
        self.weight, self.bias, self.divisor = weight, bias, divisor

    def forward(self, x):
        x = x if self.divisor is None else x / self.divisor
        return nn.functional.linear(x, self.weight, self.bias)


class Exact(BalancedLinear):
    """Factors from 0.5 to 2 by the sum of the input's magnitudes; weights stay float."""

    def new_statistics(self, x):
        found = InputStatistics(self)
        found.total = torch.zeros(self.in_features)
        return found

    def count(self, statistics, x):
        statistics.total += x.detach().reshape(-1, self.in_features).float().abs().sum(0)

    @classmethod
    def choose(cls, layers, tied):
        total = tied.mean(layers[0].counted().total)
        return Balance(0.5 + 1.5 * total / total.max())

    def solve_with(self, factors):
        return LinearSolution(self.float_weight * factors)

    def take(self, solution, x, y):
        bias = self.ori_module.bias if solution.bias is None else solution.bias
        self.deploy = Divided(solution.weight, bias, solution.divisor)
        self.outcome.notes.extend(solution.notes)
        self.outcome.status = "calibrated"
        self.ori_module = None


@pytest.fixture(autouse=True)
def exact():
    amct.algorithm_register("exact", "Linear", Exact)
    yield
    del REGISTRY._algorithms["exact", "Linear"]


def batches(number=2):
    g = torch.Generator().manual_seed(1)
    sizes = torch.rand(WIDTH, generator=g) * 3
    return [torch.randn(2, 8, WIDTH, generator=g) * sizes for _ in range(number)]


def config(**changes):
    return {
        "batch_num": 2,
        "quant_cfg": {"weights": {"type": "int8"}},
        "algorithm": "exact",
        **changes,
    }


def outputs(net, x):
    with torch.no_grad():
        y = net(x)
    return torch.cat(y, -1) if isinstance(y, tuple) else y


def calibrated(make, by_blocks=False, **changes):
    """The float network, its calibrated copy, and what is told of each layer's factors."""
    torch.manual_seed(0)
    net = make().eval()
    plain = copy.deepcopy(net)
    amct.quantize(net, config(**changes))
    if by_blocks:
        amct.calibrate_blocks(net, batches(), blocks="")
    else:
        for x in batches():
            torch.testing.assert_close(outputs(net, x), outputs(plain, x), **ROUNDING)
    return plain, net, {layer.name: " ".join(layer.notes) for layer in net.amct_ledger.quantized}


def own(norm, **options):
    return lambda: nets.Readers(norm(**options))


def own_in(network):
    return lambda: network(nets.OwnNorm())


MOVED = {
    "rms norm": (own(nn.RMSNorm, normalized_shape=WIDTH), {"a": "norm.weight", "b": "norm.weight"}),
    "layer norm": (own(nn.LayerNorm, normalized_shape=WIDTH), {"a": "norm.weight, norm.bias"}),
    "norm written out": (own(nets.OwnNorm), {"a": "norm.weight", "b": "norm.weight"}),
    "norm with bias written out": (own(nets.OwnNorm, bias=True), {"b": "norm.weight, norm.bias"}),
    "attention": (nets.Attention, {"o": "v"}),
    "attention in plain products": (lambda: nets.Attention(eager=True), {"o": "v"}),
    "grouped queries, expanded": (lambda: nets.Attention(2), {"o": "v"}),
    "grouped queries, repeated": (lambda: nets.Attention(2, "interleave"), {"o": "v"}),
    "grouped queries, in the kernel": (lambda: nets.Attention(2, "sdpa"), {"o": "v"}),
    "grouped queries, key and value in one": (lambda: nets.Attention(2, fused=True), {"o": "kv"}),
    "gated": (nets.Gated, {"down": "up"}),
    "gated, in one product": (lambda: nets.Gated(fused=True), {"down": "both"}),
    "relu": (lambda: nets.chain(nn.ReLU()), {"2": "0"}),
    "dropout and reshape": (
        lambda: nets.chain(nn.Sequential(nn.Dropout(), nn.Flatten(0, 1))), {"2": "0"}
    ),
}  # fmt: skip
STAY = {
    "gelu": (lambda: nets.chain(nn.GELU()), "2", r"made by gelu"),
    "residual": (own_in(nets.Residual), "a", r"something else reads .*\(add\)"),
    "output": (own_in(nets.Returned), "a", r"leaves the model as an output"),
    "read by Python": (own_in(nets.Looked), "a", "outside of torch|something else"),
    "norm twice": (own_in(nets.NormTwice), "b", r"norm.weight is read several times"),
    "layer twice": (own_in(nets.LayerTwice), "a", r"called again|several times"),
    "channels mixed": (nets.Mixed, "second", r"stay at its input"),
    "passes differ": (nets.Changing, "a", r"made by tanh"),
    "norm without weight": (
        own(nn.RMSNorm, normalized_shape=WIDTH, elementwise_affine=False), "a", "stay at its input",
    ),
}  # fmt: skip
STAY["input of the model"] = (lambda: nn.Sequential(nets.linear()), "0", "from outside")


@pytest.mark.parametrize("by_blocks", [False, True], ids=["passes", "blocks"])
@pytest.mark.parametrize("case", MOVED)
def test_moved_and_exact(case, by_blocks):
    make, places = MOVED[case]
    whole = (lambda: nn.Sequential(make())) if by_blocks else make
    plain, net, notes = calibrated(whole, by_blocks)
    prefix = "0." if by_blocks else ""
    for name, place in places.items():
        place = ", ".join(prefix + part for part in place.split(", "))
        assert f"factors moved into {place}" in notes[prefix + name]
        assert net.get_submodule(prefix + name).deploy.divisor is None
    for x in batches(3):
        torch.testing.assert_close(outputs(net, x), outputs(plain, x), **ROUNDING)


@pytest.mark.parametrize("case", STAY)
def test_stays_and_exact(case):
    make, name, reason = STAY[case]
    plain, net, notes = calibrated(make)
    assert net.get_submodule(name).deploy.divisor is not None
    torch.testing.assert_close(outputs(net, batches()[0]), outputs(plain, batches()[0]), **ROUNDING)
    assert re.search(reason, notes[name]), notes[name]
    for key, value in plain.named_parameters():
        if key.startswith("norm"):
            assert torch.equal(value, net.get_parameter(key))


def test_a_layer_that_stays_float_and_reads_the_input_keeps_factors_there():
    plain, net, notes = calibrated(own(nets.OwnNorm), skip_layers={"b"})
    assert "something else reads its input too (linear)" in notes["a"]
    x = batches()[0]
    torch.testing.assert_close(outputs(net, x), outputs(plain, x), **ROUNDING)


def test_factors_move_into_a_layer_that_stays_float():
    plain, net, notes = calibrated(lambda: nets.Gated(), skip_layers={"up"})
    assert "factors moved into up.weight, up.bias" in notes["down"]
    assert not torch.equal(net.up.weight, plain.up.weight)
    x = batches()[0]
    torch.testing.assert_close(outputs(net, x), outputs(plain, x), **ROUNDING)


def test_a_tied_weight_is_left_alone():
    def make():
        net = nets.Gated()
        net.gate.weight = net.up.weight
        return net

    plain, net, notes = calibrated(make, skip_layers={"up", "gate"})
    assert re.search("up.weight is (gate|up).weight and|read several times", notes["down"])
    assert torch.equal(net.up.weight, plain.up.weight)


def test_channels_of_one_origin_have_one_factor():
    _, net, _ = calibrated(lambda: nets.Attention(2))
    factors = net.o.scale
    assert torch.equal(factors[:4], factors[4:8])
    assert not torch.equal(factors[:4], factors[8:12])


def test_layers_with_one_input_share_their_factors_and_say_so():
    _, net, notes = calibrated(own(nets.OwnNorm))
    assert torch.equal(net.a.scale, net.b.scale)
    assert "factors shared with b" in notes["a"] and "factors shared with a" in notes["b"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rounded_norm_gives_layers_the_factors_it_was_really_divided_by(dtype):
    net = nets.Readers(nets.OwnNorm()).to(dtype).eval()
    before = net.norm.weight.detach().float()
    amct.quantize(net, config())
    for x in batches():
        outputs(net, x.to(dtype))
    assert net.norm.weight.dtype == dtype
    # One float32 rounding of the quotient and one of the product.
    torch.testing.assert_close(net.norm.weight.float() * net.a.scale, before, rtol=3e-7, atol=0)


def test_a_float_matrix_in_half_precision_is_not_rounded_again():
    net = nets.Gated().bfloat16().eval()
    amct.quantize(net, config(skip_layers={"up"}))
    before = net.up.weight.clone()
    for x in batches():
        outputs(net, x.bfloat16())
    assert torch.equal(net.up.weight, before)
    assert "would be rounded again" in " ".join(net.amct_ledger.quantized[-1].notes)


class TestForward:
    """The model's forward while it is watched."""

    def test_is_its_own_again_after_calibration(self):
        _, net, _ = calibrated(nets.Gated)
        assert "forward" not in net.__dict__

    def test_is_its_own_again_after_convert(self):
        net = nn.Sequential(nets.linear()).eval()
        amct.quantize(net, {"algorithm": {"awq": {}}, "quant_cfg": {"weights": {"type": "int8"}}})
        twin = copy.deepcopy(net)
        assert isinstance(twin.__dict__["forward"], FactorWatch)
        outputs(net, torch.randn(2, WIDTH))
        amct.convert(net)
        assert "forward" not in net.__dict__
        assert twin[0].batches_seen == 0  # a copy is watched on its own
        outputs(twin, torch.randn(2, WIDTH))
        amct.convert(twin)

    def test_a_refused_batch_shows_nothing_and_calibration_goes_on(self):
        net = nets.Gated().eval()
        plain = copy.deepcopy(net)
        amct.quantize(net, config())
        bad = torch.full((2, 8, WIDTH), torch.nan)
        with pytest.raises(CalibrationError, match="NaN"):
            outputs(net, bad)
        for x in batches():
            outputs(net, x)
        torch.testing.assert_close(outputs(net, x), outputs(plain, x), **ROUNDING)
        assert net.down.deploy.divisor is None

    def test_in_inference_mode(self):
        net = nets.Readers(nets.OwnNorm()).eval()
        plain = copy.deepcopy(net)
        amct.quantize(net, config())
        with torch.inference_mode():
            for x in batches():
                net(x)
            torch.testing.assert_close(net(x), plain(x), **ROUNDING)

    def test_layers_called_without_the_model_solve_alone(self):
        net = nets.Gated().eval()
        amct.quantize(net, config())
        for x in batches():
            with torch.no_grad():
                net.up(x)
        assert net.up.ori_module is None
        assert net.up.deploy.divisor is not None


def test_the_shared_exponent_of_awq_makes_no_layer_worse_than_nearest():
    torch.manual_seed(0)
    net = nets.Attention().eval()
    weights = {"type": "int4", "symmetric": True}
    amct.quantize(net, config(quant_cfg={"weights": weights}, algorithm="awq"))
    for x in batches():
        outputs(net, x)
    shares = [note for layer in net.amct_ledger.quantized for note in layer.notes]
    shares = [float(n.split()[2]) for n in shares if n.startswith("output error")]
    assert len(shares) == 4
    assert max(shares) <= 1.0


def test_statistics_of_one_input_are_kept_once():
    net = nets.Readers(nets.OwnNorm()).eval()
    amct.quantize(net, config(algorithm="awq", batch_num=3))
    for x in batches():
        outputs(net, x)
    assert net.a.statistics is net.b.statistics
    assert net.a.statistics.moments.tokens == 32
