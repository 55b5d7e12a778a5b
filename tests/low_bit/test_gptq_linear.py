import copy
import weakref

import pytest
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.algorithms.gptq import GptqSettings, solve_gptq
from amct_pytorch.algorithms.gptq_calibration import GptqCalibration
from amct_pytorch.algorithms.hessian import Hessian
from amct_pytorch.algorithms.padding import padding_mask
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.errors import AmctError, CalibrationError
from amct_pytorch.formats import FORMATS, Granularity


class Attention(nn.Module):
    """Two layers on one input, one behind them."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(64, 64, bias=False)
        self.key = nn.Linear(64, 64)
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        return self.out(torch.tanh(self.query(x)) * self.key(x))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention()


def batches(count, shape=(2, 40, 64), seed=0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=g) / 8
    return [torch.randn(*shape, generator=g) @ mixing for _ in range(count)]


def config(batch_num, weights=None, options=None):
    weights = weights or {"type": "int4", "strategy": "group", "group_size": 32}
    return {
        "batch_num": batch_num,
        "quant_cfg": {"weights": weights},
        "algorithm": {"gptq": options or {}},
    }


def calibrated(inputs, *, weights=None, options=None):
    model = network()
    amct.quantize(model, config(len(inputs), weights, options))
    for x in inputs:
        model(x)
    return model


@pytest.mark.parametrize(
    "weights",
    [
        {"type": "int4", "strategy": "group", "group_size": 32, "symmetric": False},
        {"type": "int8", "strategy": "channel"},
        {"type": "float8_e4m3fn", "strategy": "tensor"},
        {"type": "float4_e2m1", "strategy": "group", "group_size": 32},
        {"type": "mxfp4_e2m1"},
        {"type": "hifloat8", "strategy": "channel"},
    ],
    ids=lambda weights: weights["type"],
)
def test_is_what_the_solver_finds_for_the_float_models_inputs(weights):
    inputs = batches(3)
    plain = network()
    model = calibrated(inputs, weights=weights)
    hessian = Hessian(64)
    for x in inputs:
        hessian.add(torch.tanh(plain.query(x)) * plain.key(x))
    fmt = FORMATS[weights["type"]]
    size = weights.get("group_size", 32 if fmt.name.startswith("mx") else None)
    granularity = Granularity("group", size) if size else Granularity(weights["strategy"])
    expected = solve_gptq(
        plain.out.weight,
        hessian.mean(),
        fmt,
        granularity,
        symmetric=weights.get("symmetric", True),
        tokens=hessian.tokens,
    )
    assert torch.equal(model.out.result.codes.float(), expected.codes.float())
    x = batches(1, seed=1)[0]
    simulated = model(x)
    deployed = amct.convert(model)(x)
    # The deploy module's kernels sum in another order, or in bfloat16 (8 bits) where fast.
    error = (deployed - simulated).norm() / simulated.norm()
    assert error < 2e-2


def test_outputs_are_nearer_than_of_plain_rounding():
    *inputs, held_out = batches(9)
    plain, nearest = network(), network()
    amct.quantize(nearest, {**config(1), "algorithm": "minmax"})
    nearest(inputs[0])
    model = calibrated(inputs)
    with torch.no_grad():
        errors = [float((m(held_out) - plain(held_out)).norm()) for m in (model, nearest)]
    assert errors[0] < 0.9 * errors[1]


def test_ledger_tells_errors_damping_and_dead_inputs():
    inputs = batches(2)
    for x in inputs:
        x[..., 5] = 0
    model = calibrated(inputs)
    notes = " ".join(model.query.outcome.notes)
    assert f"{model.query.result.loss:.3g}" in notes
    assert f"{model.query.result.loss_nearest:.3g}" in notes
    assert "damping" in notes
    assert "1 input channels had no input" in notes
    quantized, weight = model.query.deploy.weight[:, 5], network().query.weight.detach()[:, 5]
    assert (quantized - weight).norm() < 0.2 * weight.norm()


def test_a_fall_back_is_told():
    model = calibrated([torch.zeros(1, 4, 64)])
    assert "rounded to the nearest" in " ".join(model.query.outcome.notes)


def test_options_reach_the_solver():
    options = {"damping": 0.5, "act_order": False, "static_groups": False, "sweeps": 0}
    inputs = batches(2)
    model = calibrated(inputs, options=options)
    hessian = Hessian(64)
    for x in inputs:
        hessian.add(x)
    expected = solve_gptq(
        network().query.weight,
        hessian.mean(),
        FORMATS["int4"],
        Granularity("group", 32),
        settings=GptqSettings(**options),
        tokens=hessian.tokens,
    )
    assert torch.equal(model.query.result.codes, expected.codes)
    assert not torch.equal(model.query.result.codes, calibrated(inputs).query.result.codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1}, "damping"),
        ({"sweeps": 1.5}, "sweeps"),
        ({"act_ordr": True}, "act_order"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(AmctError, match=message):
        amct.quantize(network(), config(1, options=options))


def test_padding_does_not_count():
    x = batches(1)[0]
    mask = torch.ones(2, 40)
    mask[:, 25:] = 0
    padded = x.clone()
    padded[mask == 0] = 100.0
    model = network()
    amct.quantize(model, config(1))
    with padding_mask(mask):
        model(padded)
    expected = calibrated([x[:, :25]])
    assert torch.equal(model.query.result.codes, expected.query.result.codes)


class TestSharing:
    """`GptqCalibration`: layers called with one tensor share statistics."""

    def three(self):
        return [GptqCalibration(name, GptqSettings()) for name in "abc"]

    def test_one_tensor_is_counted_once(self):
        a, b, c = self.three()
        for x in batches(2):
            other = x.clone()
            a.observe(x)
            b.observe(x)
            c.observe(other)
        assert a.shared is b.shared
        assert c.shared is not a.shared
        assert a.shared.hessian.tokens == c.shared.hessian.tokens == 160
        assert torch.equal(a.shared.hessian.mean(), c.shared.hessian.mean())

    def test_the_factorization_is_shared_too(self):
        a, b, _ = self.three()
        x = batches(1)[0]
        a.observe(x)
        b.observe(x)
        grid = WeightGrid(FORMATS["int4"], Granularity("channel"))
        shared = b.shared
        first = shared.prepared(a.settings, grid)
        assert shared.prepared(b.settings, grid) is first
        b.observe(batches(1, seed=3)[0])
        assert b.shared.prepared(b.settings, grid) is not first

    def test_a_layer_that_leaves_goes_on_from_a_copy(self):
        a, b, _ = self.three()
        x, y, z = batches(3)
        a.observe(x)
        b.observe(x)
        b.observe(y)
        a.observe(z)
        assert a.shared is not b.shared
        expected = Hessian(64)
        expected.add(x)
        expected.add(y)
        assert torch.equal(b.shared.hessian.mean(), expected.mean())
        expected = Hessian(64)
        expected.add(x)
        expected.add(z)
        assert torch.equal(a.shared.hessian.mean(), expected.mean())

    def test_statistics_are_freed_by_the_last_layer(self):
        a, b, _ = self.three()
        x = batches(1)[0]
        a.observe(x)
        b.observe(x)
        gone = weakref.ref(a.shared)
        grid = WeightGrid(FORMATS["int4"], Granularity("channel"))
        a.solve(network().query.weight, grid)
        b.solve(network().key.weight, grid)
        del x
        assert gone() is None

    def test_no_token_is_an_error(self):
        grid = WeightGrid(FORMATS["int4"], Granularity("channel"))
        with pytest.raises(CalibrationError, match="a: no input token"):
            self.three()[0].solve(network().query.weight, grid)


def test_a_copied_model_calibrates_alone():
    model = network()
    amct.quantize(model, config(2))
    x, y = batches(2)
    model(x)
    twin = copy.deepcopy(model)
    model(y)
    assert model.query.calibrated and not twin.query.calibrated
    twin(y)
    assert torch.equal(model.query.result.codes, twin.query.result.codes)
