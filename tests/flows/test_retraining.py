"""Quantization-aware training of a whole model: its calls, its state, its files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows.live_tensors import LiveTensors
from flows.retraining_case import (
    INT4,
    created,
    data,
    evaluated,
    loss_of,
    network,
    run_files,
    saved,
    train,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import amct_pytorch as amct
from amct_pytorch.nn.retrain import retrain_layers
from amct_pytorch.record.record_file import read_record


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor]]) -> None:
    model.train()
    for batch in batches:
        torch.manual_seed(int(1000 * float(batch[0][0, 0, 0, 0].abs())))  # of the dropout
        optimizer.zero_grad()
        loss_of(model(*batch)).backward()
        optimizer.step()


@pytest.mark.parametrize("stop", [1, 2, 4], ids=["while observing", "just then", "afterwards"])
@pytest.mark.parametrize("cfg", [None, INT4 % "ulq_retrain"], ids=["arq8", "ulq4"])
def test_stopping_saving_and_restoring_is_not_stopping(stop: int, cfg: str | None) -> None:
    model, batches = network(), data()
    whole = created(model, batches[0], cfg, batch_num=2)
    optimizer = torch.optim.Adam(whole.parameters(), 0.01)
    steps(whole, optimizer, batches)

    first = created(model, batches[0], cfg, batch_num=2)
    optimizer = torch.optim.Adam(first.parameters(), 0.01)
    steps(first, optimizer, batches[:stop])
    # Evaluating in between changes nothing.
    evaluated(first, batches[5])
    wrapped = {f"module.{key}": value for key, value in first.state_dict().items()}
    torch.save({"model": wrapped, "optimizer": optimizer.state_dict()}, "stopped.pth")

    second = amct.restore_quant_retrain_model(
        "retrain.json", model, "record.txt", batches[0], "stopped.pth", state_dict_name="model"
    )
    same_state(second.state_dict(), first.state_dict())
    optimizer = torch.optim.Adam(second.parameters(), 0.01)
    optimizer.load_state_dict(torch.load("stopped.pth")["optimizer"])
    steps(second, optimizer, batches[stop:])
    same_state(second.state_dict(), whole.state_dict())
    for a, b in zip(evaluated(second, batches[0]), evaluated(whole, batches[0]), strict=True):
        assert np.array_equal(a, b)


def test_the_first_batches_run_in_float_and_the_others_do_not() -> None:
    model, batches = network(), data()
    model[7].p = 0.0
    trained = created(model, batches[0], batch_num=2)
    floats = copy.deepcopy(model).train()
    for i, batch in enumerate(batches[:3]):
        same = torch.equal(trained.train()(*batch), floats(*batch))
        assert same == (i < 2)
        if i < 2:
            with torch.no_grad():
                assert torch.equal(trained.eval()(*batch), floats.eval()(*batch)) == (i < 1)
            floats.train()


def test_clip_values_of_the_config_need_no_batches() -> None:
    (batch, *_) = data(1)
    cfg = """retrain_data_quant_config { ulq_quantize {
      clip_max_min { clip_max: 3 clip_min: -2.5 } } }"""
    trained = created(network(), batch, cfg)
    assert evaluated(trained, batch)[0].shape == (3, 5)
    factors = read_record("record.txt").factors["0"]
    assert factors.scale_d == pytest.approx(5.5 / 255)
    assert factors.offset_d == round(2.5 / factors.scale_d) - 128


class Behind(nn.Module):
    """A convolution behind something."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.conv = before, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.before(x))


@pytest.mark.parametrize(
    ("before", "fixed"),
    [
        (nn.ReLU(), True),
        (nn.ReLU(inplace=True), True),
        (F.relu, True),
        (lambda x: F.relu(x, inplace=True), True),
        (torch.relu, True),
        (lambda x: x.relu(), True),
        (lambda x: (x + 0).relu_(), True),
        (lambda x: x.clamp(min=0), True),
        (lambda x: torch.clamp_min(x, 0.0), True),
        (nn.ReLU6(), None),
        (lambda x: x.clamp(0, 6), None),
        (lambda x: x.clamp(min=-1), None),
        (nn.SiLU(), None),
        (nn.Identity(), None),
        (lambda x: F.relu(x) - 1, None),
    ],
)
def test_the_lower_end_stays_zero_behind_a_relu(
    before: Callable[[Tensor], Tensor], fixed: bool | None
) -> None:
    (batch, *_) = data(1)
    trained = created(Behind(before), batch)
    assert retrain_layers(trained)["conv"].input_quantizer.fixed_min is fixed


def test_otherwise_the_least_value_observed_decides() -> None:
    batches = data(2)
    trained = created(Behind(nn.ReLU6()), batches[0])
    train(trained, batches)
    assert retrain_layers(trained)["conv"].input_quantizer.fixed_min is True
    trained = created(Behind(nn.Tanh()), batches[0])
    train(trained, batches)
    assert retrain_layers(trained)["conv"].input_quantizer.fixed_min is False


def test_the_weights_on_the_grid_are_those_with_batchnorm_folded_in() -> None:
    model, batches = network(), data()
    with torch.no_grad():
        model[1].weight[:] = torch.tensor([1.0, -2.0, 0.0, 1e-9, -0.5, 3.0, 0.1, 1.5])
        model[1].running_var.uniform_(0.1, 4.0)
    for channel_wise in (True, False):
        changes = {} if channel_wise else {"channel_wise": False}
        trained = created(model, batches[0], **changes)
        train(trained, batches[:2], rate=0.0)
        trained.eval()
        layer = retrain_layers(trained)["0"]
        weight = layer.layer.weight
        norm = trained[1].norm
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        with torch.no_grad():
            fused = weight * factor.view(-1, 1, 1, 1)
            onto_grid = layer.fake_quantized(weight) * factor.view(-1, 1, 1, 1)
        evaluated(trained, batches[0])
        factors = read_record("record.txt").factors["0"]
        scale = torch.tensor(factors.scale_w).view(-1, 1, 1, 1)
        assert scale.numel() == (8 if channel_wise else 1)
        wanted = torch.round(fused / scale).clamp(-128, 127) * scale
        torch.testing.assert_close(onto_grid, wanted, rtol=1e-5, atol=1e-7)


def test_channels_that_begin_at_zero_can_be_trained() -> None:
    model, batches = network(), data(6)
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 0.5)  # the ReLU behind it lets a gradient through
    trained = created(model, batches[0])
    train(trained, batches, rate=0.1)
    assert bool((trained[1].norm.weight != 0).all())
    assert all(bool(torch.isfinite(p).all()) for p in trained.parameters())


def test_training_goes_on_after_saving_as_if_nothing_had_been() -> None:
    model, batches = network(), data()
    states = []
    for saving in (False, True):
        trained = created(model, batches[0])
        optimizer = torch.optim.SGD(trained.parameters(), 0.01, momentum=0.9)
        steps(trained, optimizer, batches[:3])
        if saving:
            before = torch.random.get_rng_state()
            saved(trained, batches[0])
            assert torch.equal(torch.random.get_rng_state(), before)
            assert all(module.training for module in trained.modules())
        steps(trained, optimizer, batches[3:])
        states.append(trained.state_dict())
    same_state(*states)


def test_synchronised_batchnorm_stays_and_is_folded_when_saved() -> None:
    model, batches = network(), data(3)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    converted.load_state_dict(model.state_dict())
    before = created(converted, batches[0])
    assert isinstance(before[1].norm, nn.SyncBatchNorm)
    trained = created(model, batches[0])
    train(trained, batches)
    expected = evaluated(trained, batches[0])[0]
    trained = nn.SyncBatchNorm.convert_sync_batchnorm(trained)
    assert isinstance(trained[1].norm, nn.SyncBatchNorm)
    assert np.array_equal(evaluated(trained, batches[0])[0], expected)
    ledger = saved(trained, batches[0])
    assert (ledger["0"]["fused"], ledger["3"]["fused"]) == ("1", "4")
    faked, deployed = run_files(batches[0])
    np.testing.assert_allclose(faked[0], expected, atol=1e-5)
    assert np.array_equal(faked[0], deployed[0])


def test_an_inference_pass_writes_the_record_and_a_training_pass_does_not() -> None:
    model, batches = network(), data(4)
    trained = created(model, batches[0])
    begun = read_record("record.txt").factors
    assert list(begun) == ["0", "3", "8"]
    assert all(layer.scale_w and layer.scale_d is None for layer in begun.values())
    train(trained, batches[:3])
    assert read_record("record.txt").factors == begun
    evaluated(trained, batches[0])
    written = Path("record.txt").stat()
    factors = read_record("record.txt").factors
    assert all(layer.complete for layer in factors.values())
    evaluated(trained, batches[1])
    assert Path("record.txt").stat().st_ino == written.st_ino  # the same: not written again
    # Also where gradients are on, which changes nothing in what is written.
    train(trained, batches[3:])
    trained.eval()
    trained(*batches[0])
    by_gradient_pass = read_record("record.txt").factors
    assert by_gradient_pass != factors
    evaluated(trained, batches[0])
    assert read_record("record.txt").factors == by_gradient_pass


def test_evaluating_with_gradients_has_them() -> None:
    trained = created(network(), data(1)[0])
    batches = data(3)
    train(trained, batches)
    trained.eval()
    x = batches[0][0].clone().requires_grad_()
    outputs = trained(x)
    outputs.sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    # What is deployed differs in the rounding of biases only.
    difference = np.abs(outputs.detach().numpy() - evaluated(trained, batches[0])[0])
    assert difference.max() < 0.02 * float(outputs.detach().abs().max())


def test_forced_float16_scales_are_in_the_record() -> None:
    cfg = "fakequant_precision_mode: FORCE_FP16_QUANT retrain_data_quant_config { }"
    batches = data(3)
    trained = created(network(), batches[0], cfg)
    train(trained, batches)
    simulated = evaluated(trained, batches[0])[0]
    for factors in read_record("record.txt").factors.values():
        assert factors.fakequant_precision_mode == "FORCE_FP16_QUANT"
        assert float(np.float16(factors.scale_d)) == pytest.approx(factors.scale_d, rel=1e-7)
    saved(trained, batches[0])
    np.testing.assert_allclose(run_files(batches[0])[0][0], simulated, atol=1e-5)


class Checkpointed(nn.Module):
    """Computes its first layers again in the backward pass, to save memory."""

    def __init__(self, body: nn.Sequential, reentrant: bool | None) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = body[:6], nn.Linear(96, 5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.body(x).flatten(1))
        x = x.requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant).flatten(1))


@pytest.mark.parametrize("batch_num", [1, 2])
def test_layers_that_are_computed_again_are_observed_once(batch_num: int) -> None:
    batches, states = data(4), []
    body, head = network(), nn.Linear(96, 5)
    for module in body:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # a second forward would update it a second time
    for reentrant in (None, False, True):
        model = Checkpointed(copy.deepcopy(body), reentrant)
        model.head = copy.deepcopy(head)
        trained = created(model, batches[0], batch_num=batch_num)
        train(trained, [(batch.clone(),) for (batch,) in batches])
        states.append(trained.state_dict())
        del states[-1]["body.1.layer.num_batches_tracked"]
        del states[-1]["body.4.layer.num_batches_tracked"]
    same_state(states[1], states[0])
    same_state(states[2], states[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_trains_on_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    batches = data(5)
    trained = created(network(), batches[0])
    train(trained, batches[:2])
    other = copied(trained)
    assert retrain_layers(other)["0"].norm is other[1] is not trained[1]
    before = copy.deepcopy(trained.state_dict())
    train(other, batches[2:], rate=0.1)
    same_state(trained.state_dict(), before)
    trained[7].p = other[7].p = 0.0
    again = copied(trained)
    train(trained, batches[2:])
    train(again, batches[2:])
    same_state(again.state_dict(), trained.state_dict())


def test_memory_does_not_grow_from_step_to_step() -> None:
    batches = data(2)
    trained = created(network(), batches[0])
    optimizer = torch.optim.SGD(trained.parameters(), 0.01, momentum=0.9)
    held = []
    with LiveTensors() as live:
        for _ in range(6):
            steps(trained, optimizer, batches)
            evaluated(trained, batches[0])
            held.append(live.bytes)
    assert held[2:] == [held[2]] * 4


def test_autocast_and_bfloat16_weights_train_and_deploy() -> None:
    batches = data(3)
    trained = created(network(), batches[0])
    optimizer = torch.optim.SGD(trained.parameters(), 0.01)
    trained.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(trained(*batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in trained.parameters())
    simulated = evaluated(trained, batches[0])[0]
    saved(trained, batches[0])
    np.testing.assert_allclose(run_files(batches[0])[0][0], simulated, atol=1e-5)

    half = [(batch.bfloat16(),) for (batch,) in batches]
    trained = created(network().bfloat16(), half[0])
    train(trained, half)
    assert trained(*half[0]).dtype == torch.bfloat16
    assert bool(torch.isfinite(trained(*half[0])).all())
