"""Quantization-aware operators: drop-in for torch's layers, one test for each property."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, CalibrationError, ConfigError
from amct_pytorch.nn.module.quantization import (
    Conv1dQAT,
    Conv2dQAT,
    Conv3dQAT,
    ConvTranspose1dQAT,
    ConvTranspose2dQAT,
    LinearQAT,
)
from amct_pytorch.nn.module.quantization.qat_layer import QatLayer

# Name -> operator, float layer, input shape.
CASES: dict[str, tuple[type[QatLayer], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (Conv1dQAT, lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
    "conv2d": (Conv2dQAT, lambda: nn.Conv2d(4, 6, (3, 1), 2, (1, 0), 2), (2, 4, 9, 8)),
    "conv2d, same": (
        Conv2dQAT,
        lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False),
        (1, 4, 5, 5),
    ),
    "conv2d, depthwise": (Conv2dQAT, lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "conv3d": (Conv3dQAT, lambda: nn.Conv3d(2, 4, 3, padding=1), (1, 2, 4, 4, 4)),
    "conv_transpose1d": (
        ConvTranspose1dQAT,
        lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1),
        (2, 4, 5),
    ),
    "conv_transpose2d": (
        ConvTranspose2dQAT,
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, dilation=2),
        (2, 4, 5, 5),
    ),
    "linear": (LinearQAT, lambda: nn.Linear(6, 5), (3, 6)),
    "linear, 4-D": (LinearQAT, lambda: nn.Linear(6, 5, bias=False), (2, 3, 4, 6)),
}
both_algorithms = pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])


def of(case: str, **weights: Any) -> tuple[QatLayer, nn.Module, Tensor]:
    operator, float_layer, shape = CASES[case]
    torch.manual_seed(0)
    layer = float_layer()
    return operator.from_float(layer, {"retrain_weight_config": weights}), layer, torch.randn(shape)


@both_algorithms
@pytest.mark.parametrize("bits", ["INT8", "INT4"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_the_float_layer_on_operands_on_their_grids(case, bits, algo):
    layer, float_layer, x = of(case, dst_type=bits, weights_retrain_algo=algo)
    assert torch.equal(layer(x), _with_weight(float_layer, layer.weight_quantizer(layer.weight), x))
    factors = layer.factors()
    assert factors.complete
    assert factors.weight_bits == int(bits[3:])
    y = layer(x)
    scale_d, offset = factors.scale_d, factors.offset_d
    steps = torch.round(x * float(torch.tensor(1.0) / torch.tensor(scale_d)))
    on_grid = steps.clamp(-128 - offset, 127 - offset) * scale_d
    weight = layer.weight_quantizer.integers(layer.weight)
    scale_w = torch.tensor(factors.scale_w)
    along = layer.weight_quantizer.layout.along_channels(scale_w, tuple(weight.shape))
    assert torch.equal(y, _with_weight(float_layer, weight * along, on_grid))
    assert torch.equal(layer.eval()(x), y)
    assert torch.equal(layer.weight, float_layer.weight)


def _with_weight(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    changed = copy.deepcopy(layer)
    changed.weight.data.copy_(weight)
    return changed(x)


@both_algorithms
@pytest.mark.parametrize("case", CASES)
def test_training_lowers_a_loss_and_changes_the_float_weights(case, algo):
    layer, float_layer, x = of(case, weights_retrain_algo=algo)
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    layer(x)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (layer(x) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(layer.weight, float_layer.weight)
    weight, scale = layer.weight, torch.tensor(layer.factors().scale_w)
    rows = layer.weight_quantizer.layout.rows(weight.detach()) / scale[:, None]
    assert (rows - rows.round()).abs().max() > 0.1  # float ones


@pytest.mark.parametrize("case", CASES)
def test_from_float_takes_everything_over_and_leaves_the_layer_alone(case):
    operator, float_layer, shape = CASES[case]
    layer = float_layer().eval()
    layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    made = operator.from_float(layer)
    assert torch.equal(torch.get_rng_state(), before)
    assert not made.training
    assert not made.weight.requires_grad
    assert isinstance(made, type(layer))
    assert made.weight.data_ptr() != layer.weight.data_ptr()
    x = torch.randn(shape)
    plain = operator.from_float(layer, {"retrain_enable": False})
    assert torch.equal(plain(x), layer(x))
    assert plain.state_dict().keys() == layer.state_dict().keys()
    assert "retrain_enable=False" in repr(plain)
    made.load_state_dict(layer.state_dict(), strict=False)
    # Until its range is known, the weight alone is quantized.
    assert (made(x) - layer(x)).abs().max() < 0.1


def test_the_constructors_follow_the_documented_order():
    conv = Conv2dQAT(4, 6, 3, 2, 1, 1, 2, False, "zeros", None, torch.float32, None)
    assert (conv.stride, conv.padding, conv.groups, conv.bias) == ((2, 2), (1, 1), 2, None)
    transposed = ConvTranspose2dQAT(4, 6, 3, 2, 1, 2, 2, False, output_padding=1)
    assert (transposed.dilation, transposed.groups) == ((2, 2), 2)
    assert transposed.output_padding == (1, 1)
    linear = LinearQAT(4, 6, False, None, torch.float32, {"retrain_enable": False})
    assert linear.bias is None
    x = torch.randn(1, 4, 5, 5)
    assert transposed(x, output_size=[12, 12]).shape == (1, 6, 12, 12)


def test_channels_by_default():
    assert Conv2dQAT(2, 3, 1).weight_quantizer.channel_wise
    assert not LinearQAT(2, 3).weight_quantizer.channel_wise
    config = {"retrain_weight_config": {"channel_wise": False}}
    quantizer = Conv2dQAT(2, 3, 1, config=config).weight_quantizer
    assert quantizer.scale(torch.ones(3, 2, 1, 1)).numel() == 1


def test_conv3d_inputs_have_no_offset():
    layer, _, x = of("conv3d")
    layer(x.relu())
    assert layer.factors().offset_d == 0


@pytest.mark.parametrize("case", ["conv2d", "linear"])
def test_copies_and_checkpoints_go_on_bitwise_the_same(case):
    layer, _, x = of(case, weights_retrain_algo="ulq_retrain")

    def go(module: nn.Module, steps: int) -> list[Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        results = []
        for _ in range(steps):
            optimizer.zero_grad()
            y = module(x)
            y.square().mean().backward()
            optimizer.step()
            results.append(y.detach())
        return results

    layer.train()
    go(layer, 2)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    loaded, _, _ = of(case, weights_retrain_algo="ulq_retrain")
    loaded.load_state_dict(layer.state_dict())
    expected = go(layer, 3)
    for other in (*copies, loaded):
        assert all(torch.equal(a, b) for a, b in zip(go(other, 3), expected, strict=True))


def test_in_a_sequential_with_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(Conv2dQAT(3, 8, 3), nn.ReLU(), nn.Flatten(), LinearQAT(8 * 16, 4))
    x = torch.randn(2, 3, 6, 6)
    model(x)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    # bfloat16 has 8 significant bits.
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@both_algorithms
def test_compiled_training_is_as_not_compiled(algo):
    torch.manual_seed(0)
    config = {"retrain_weight_config": {"weights_retrain_algo": algo}}
    model = nn.Sequential(
        Conv2dQAT(3, 4, 3, config=config), nn.ReLU(), nn.Flatten(), LinearQAT(64, 4, config=config)
    )
    x = torch.randn(2, 3, 6, 6)
    model(x)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager")
    results = []
    for run in (model, compiled):
        y = run(x)
        y.square().mean().backward()
        results.append(y.detach())
    assert torch.equal(*results)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "dtype": (
        lambda: Conv2dQAT(2, 2, 1, dtype=torch.float16),
        ArgumentValueError,
        "Conv2dQAT: dtype is torch.float16; allowed: torch.float32",
    ),
    "dtype of the layer": (
        lambda: LinearQAT.from_float(nn.Linear(2, 2).half()),
        ArgumentValueError,
        "LinearQAT: dtype is torch.float16",
    ),
    "padding_mode": (
        lambda: Conv2dQAT(2, 2, 3, padding_mode="reflect"),
        ArgumentValueError,
        "padding_mode is \"reflect\"; allowed: 'zeros'",
    ),
    "padding_mode of the layer": (
        lambda: Conv2dQAT.from_float(nn.Conv2d(2, 2, 3, padding_mode="circular")),
        ArgumentValueError,
        'padding_mode is "circular"',
    ),
    "rank": (
        lambda: Conv2dQAT(2, 2, 1)(torch.zeros(2, 4, 4)),
        ArgumentValueError,
        r"Conv2dQAT: the input has 3 dimensions \[2, 4, 4\]; allowed: 4",
    ),
    "dilation in depth": (
        lambda: Conv3dQAT(2, 2, 3, dilation=(2, 1, 1)),
        ArgumentValueError,
        "Conv3dQAT: its dilation in depth is 2; supported is 1",
    ),
    "channel-wise linear": (
        lambda: LinearQAT(2, 2, config={"retrain_weight_config": {"channel_wise": True}}),
        ConfigError,
        "config of LinearQAT: retrain_weight_config.channel_wise is true; allowed: false",
    ),
    "clip_min": (
        lambda: LinearQAT(2, 2, config={"retrain_data_config": {"clip_min": 2.0, "clip_max": 1.0}}),
        ConfigError,
        "retrain_data_config.clip_min is 2.0; allowed: a number < 0, or None",
    ),
    "unknown key": (
        lambda: LinearQAT(2, 2, config={"retrain_data_config": {"dst_typ": "INT8"}}),
        ConfigError,
        r"retrain_data_config.dst_typ: unknown key \(did you mean 'dst_type'\?\)",
    ),
    "unknown block": (
        lambda: LinearQAT(2, 2, config={"retrain_data": {}}),
        ConfigError,
        "retrain_data: unknown key",
    ),
    "unknown type": (
        lambda: LinearQAT(2, 2, config={"retrain_data_config": {"dst_type": "INT16"}}),
        ConfigError,
        'dst_type is "INT16"; allowed: "INT8" or "INT4"',
    ),
    "unknown algorithm": (
        lambda: LinearQAT(2, 2, config={"retrain_weight_config": {"weights_retrain_algo": "arq"}}),
        ConfigError,
        'weights_retrain_algo is "arq"; allowed: "arq_retrain" or "ulq_retrain"',
    ),
    "batch_num": (
        lambda: LinearQAT(2, 2, config={"retrain_data_config": {"batch_num": 0}}),
        ConfigError,
        "batch_num is 0; allowed: an integer >= 1",
    ),
    "no dict": (lambda: LinearQAT(2, 2, config=[]), ArgumentTypeError, "allowed: a dict, or None"),
    "another layer": (
        lambda: Conv2dQAT.from_float(nn.Linear(2, 2)),
        ArgumentTypeError,
        "Conv2dQAT.from_float: mod is a Linear; allowed: Conv2d",
    ),
    "own forward": (
        lambda: Conv2dQAT.from_float(OwnForward(2, 2, 1)),
        ArgumentTypeError,
        "mod is a OwnForward, whose forward is its own; allowed: Conv2d",
    ),
    "parametrized": (
        lambda: LinearQAT.from_float(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
        ArgumentValueError,
        "the weight of mod is parametrized",
    ),
    "factors before training": (
        lambda: LinearQAT(2, 2).factors(),
        CalibrationError,
        "0 of batch_num 1 training batches have run",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_ulq_quantize_means_ulq_retrain():
    config = {"retrain_weight_config": {"weights_retrain_algo": "ulq_quantize"}}
    assert LinearQAT(2, 2, config=config).weight_quantizer.algo == "ulq_retrain"
