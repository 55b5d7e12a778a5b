"""What a look at a model finds, one structure a test, and that it leaves no trace."""

import copy
import random
import re
from typing import Any

import pytest
import torch
from graph.networks import CASES, Net, conv, fresh, norm
from torch import Tensor, nn

from amct_pytorch.errors import ArgumentTypeError, ModelError
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs


@pytest.mark.parametrize("name", CASES)
def test_layers_reasons_and_fusable_norms(name: str) -> None:
    case = CASES[name]()
    graph = look_at(case.model, ModelInputs.of(case.inputs))
    found = {layer.name for layer in graph.layers if layer.quantizable}
    reasons = {layer.name: layer.reason for layer in graph.layers if layer.reason is not None}
    assert found == case.quantizable, reasons
    assert graph.fusable_norms == case.fused
    assert set(reasons) == set(case.left_out)
    for layer, part in case.left_out.items():
        assert re.search(part, reasons[layer]), reasons[layer]
    assert found <= set(graph.calls)


@pytest.mark.parametrize("name", CASES)
def test_model_and_inputs_are_left_as_they_were(name: str) -> None:
    case = CASES[name]()
    model, inputs = case.model, ModelInputs.of(case.inputs)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    kept = [t.clone() for t in _tensors(inputs)]
    seeds = torch.get_rng_state(), random.getstate()
    hooks = _hooks(model)
    look_at(model, inputs)
    after = model.state_dict()
    assert list(after) == list(before)
    # NaN-proof and bit for bit.
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [module.training for module in model.modules()] == modes
    assert modes[0], "cases start in training mode"
    assert _hooks(model) == hooks
    assert torch.equal(torch.get_rng_state(), seeds[0])
    assert random.getstate() == seeds[1]
    assert all(torch.equal(a, b) for a, b in zip(_tensors(inputs), kept, strict=True))


def _tensors(inputs: ModelInputs) -> list[Tensor]:
    from amct_pytorch.graph.tensors import tensors_in

    return list(tensors_in((inputs.args, inputs.kwargs)))


def _hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_random_numbers_in_the_forward_do_not_reach_the_user() -> None:
    net = Net(lambda self, x: self.a(x + torch.rand_like(x)), a=conv())
    before = torch.get_rng_state()
    look_at(net, ModelInputs.of(torch.randn(1, 4, 8, 8, generator=torch.Generator())))
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_changed_in_place_by_the_forward_are_the_users_no_more() -> None:
    net = Net(lambda self, x: self.a(x.mul_(2)), a=conv())
    x = torch.ones(1, 4, 8, 8)
    look_at(net, ModelInputs.of(x))
    assert torch.equal(x, torch.ones_like(x))


def test_order_of_calls_is_the_order_of_running() -> None:
    net = Net(lambda self, x: self.a(self.b(x)), a=conv(), b=conv())
    graph = look_at(net, ModelInputs.of(torch.randn(1, 4, 8, 8)))
    assert [layer.name for layer in graph.layers] == ["a", "b"]
    assert list(graph.calls) == ["b", "a"]


def test_layers_are_described() -> None:
    net = nn.Sequential(
        conv(4, 8, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    first, last = look_at(net, ModelInputs.of(torch.randn(2, 4, 9, 7))).layers
    assert (first.kind, first.in_channels, first.groups) == ("Conv2d", 4, 2)
    assert (first.weight_shape, first.input_shape) == ((8, 2, 3, 3), (2, 4, 9, 7))
    assert (last.kind, last.in_channels, last.groups) == ("Linear", 8, 1)
    assert (last.weight_shape, last.input_shape) == ((3, 8), (2, 8))


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(7, -1)  # the line that fails


def test_a_failing_forward_names_module_file_and_line() -> None:
    net = nn.Sequential(conv(), nn.Sequential(nn.ReLU(), Broken()))
    with pytest.raises(ModelError) as caught:
        look_at(net, ModelInputs.of(torch.randn(1, 4, 8, 8)))
    text = str(caught.value)
    with open(__file__, encoding="utf-8") as source:  # noqa: PTH123
        line = next(i for i, row in enumerate(source, 1) if "the line that fails" in row)
    assert "in module '1.1'" in text
    assert f"{__file__}:{line}" in text
    assert "shape '[7, -1]' is invalid" in text
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_wrong_input_names_the_torch_layer_and_the_users_line() -> None:
    net = Net(lambda self, x: self.head(x), head=nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"in module 'head' .*test_look\.py:\d+.*Check that model"):
        look_at(net, ModelInputs.of(torch.randn(1, 4)))


def test_lazy_layers_must_be_made_first() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    with pytest.raises(ModelError, match=r"'0\.weight'.*run it once"):
        look_at(net, ModelInputs.of(torch.randn(1, 4, 8, 8)))


def test_a_model_that_cannot_be_copied() -> None:
    net = nn.Sequential(conv())
    net.cache = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ModelError, match=r"cannot be copied .*non-leaf tensors"):
        look_at(net, ModelInputs.of(torch.randn(1, 4, 8, 8)))


@pytest.mark.parametrize("model", [None, {"conv": 1}, nn.Conv2d])
def test_something_that_is_no_model(model: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"model is a .*; allowed is a torch.nn.Module"):
        look_at(model, ModelInputs.of(torch.randn(1)))


def test_look_works_in_inference_mode_and_on_shared_norm_parameters() -> None:
    case = fresh("residual")
    case.model.bn2.weight = case.model.bn1.weight
    with torch.inference_mode():
        graph = look_at(case.model, ModelInputs.of(case.inputs))
    # Folding reads a norm's parameters and changes none, so sharing them is no obstacle.
    assert graph.fusable_norms == case.fused


def test_norm_behind_a_linear_is_not_folded() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    assert look_at(net, ModelInputs.of(torch.randn(3, 4))).fusable_norms == {}


def test_same_model_twice_gives_the_same_answer() -> None:
    net = nn.Sequential(conv(), norm(), conv())
    inputs = ModelInputs.of(torch.randn(1, 4, 8, 8))
    first, second = look_at(net, inputs), look_at(net, inputs)
    assert first.layers == second.layers
    assert first.fusable_norms == second.fusable_norms
