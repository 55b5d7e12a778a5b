"""An instrumented model computes what the original does, on every structure."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph.networks import CASES, Case, Net, conv, float_output, fresh, image, norm
from torch import Tensor, nn

from amct_pytorch.errors import ModelError
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs, tensors_in
from amct_pytorch.nn.instrument import instrument
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.wrapped import CompressedLayer, Stage, compressed_layers

QUANTIZABLE = [name for name, make in CASES.items() if make().quantizable]


class Counting(Stage):
    """The float call, counted."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        self.ran.append(layer.name)
        return call.run(call.x, layer.weight, layer.bias)


def instrumented(case: Case, *, fuse: bool = True) -> nn.Module:
    inputs = ModelInputs.of(case.inputs)
    graph = look_at(case.model, inputs)
    fused = graph.fusable_norms if fuse else {}
    return instrument(case.model, graph, inputs, case.quantizable, fused)


def run(model: nn.Module, case: Case) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(ModelInputs.of(case.inputs).copied().call(model)))


def compare(case: Case, found: list[Tensor], *, exact: bool) -> None:
    expected = list(tensors_in(float_output(case)))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        # Without fusion the same operators run on the same numbers, but for a bias of zeros
        # where there was none. Fused weights are rounded to float32 once more: a few of its
        # steps in sums of about 36 products of size 1.
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", QUANTIZABLE)
@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
def test_float_output_is_the_original(name: str, fuse: bool) -> None:
    case = fresh(name)
    # torch's own fused kernel for a transformer layer sums in another order.
    exact = not fuse and name != "transformer_layer"
    compare(case, run(instrumented(case, fuse=fuse), case), exact=exact)


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_every_layer_runs_through_its_stage_once(name: str) -> None:
    case = fresh(name)
    model = instrumented(case)
    stage = Counting()
    layers = compressed_layers(model)
    assert set(layers) == case.quantizable
    for layer in layers.values():
        layer.stage = stage
    found = run(model, case)
    assert sorted(stage.ran) == sorted(case.quantizable)
    compare(case, found, exact=False)


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_the_users_model_is_left_alone(name: str) -> None:
    case = CASES[name]()
    before = copy.deepcopy(case.model.state_dict())
    types = [type(module) for module in case.model.modules()]
    state = torch.get_rng_state()
    instrumented(case)
    assert [type(module) for module in case.model.modules()] == types
    after = case.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.requires_grad for parameter in case.model.parameters())
    assert case.model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["chain", "parametrized_weight", "padding_subclass", "two_names"])
def test_a_deep_copy_works_by_itself(name: str) -> None:
    case = fresh(name)
    model = instrumented(case)
    copied = copy.deepcopy(model)
    assert set(compressed_layers(copied)) == case.quantizable
    compare(case, run(copied, case), exact=False)
    with torch.no_grad():
        for layer in compressed_layers(model).values():
            layer.weight.zero_()
            layer.bias.zero_()
    compare(case, run(copied, case), exact=False)


def test_the_toolkits_weight_is_the_one_that_is_used() -> None:
    case = fresh("weight_standardisation")
    model = instrumented(case)
    layer = compressed_layers(model)["0"]
    before = run(model, case)[0]
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.add_(1)
    # Its own forward would standardise the doubling away.
    assert not torch.allclose(run(model, case)[0], before)


def test_parameters_of_wrapped_layers_are_frozen_and_in_eval_mode() -> None:
    model = instrumented(fresh("residual"))
    assert not model.training
    for layer in compressed_layers(model).values():
        assert not layer.weight.requires_grad
        assert not layer.bias.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_bad_weight_names_its_layer(bad: float, what: str) -> None:
    case = fresh("residual")
    with torch.no_grad():
        getattr(case.model.b, what).view(-1)[:2] = bad
    with pytest.raises(ModelError, match=rf"the {what} of layer 'b' holds 2 values that are NaN"):
        instrumented(case)


def test_a_bad_norm_names_layer_and_norm() -> None:
    case = fresh("residual")
    case.model.bn2.running_var[1] = -1.0
    with pytest.raises(ModelError, match=r"weight of layer 'b with bn2 fused'.*NaN or infinite"):
        instrumented(case)
    # Unfused, the norm is not the toolkit's business.
    assert set(compressed_layers(instrumented(case, fuse=False))) == case.quantizable


def test_an_activating_norm_still_activates() -> None:
    case = fresh("activating_norm")
    model = instrumented(case)
    between = model[:2](case.inputs)
    with torch.no_grad():
        expected = F.relu(nn.BatchNorm2d.forward(case.model[1], case.model[0](case.inputs)))
    torch.testing.assert_close(between, expected, rtol=1e-4, atol=1e-5)
    assert float(between.min()) == 0.0


def test_a_layer_inside_a_layer_of_another_kind() -> None:
    class ConvWithHead(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 3, padding=1)
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(x))

    case = Case(nn.Sequential(ConvWithHead()).eval(), image(), {"0", "0.head"})
    model = instrumented(case)
    stage = Counting()
    for layer in compressed_layers(model).values():
        layer.stage = stage
    compare(case, run(model, case), exact=True)
    assert stage.ran == ["0", "0.head"]


def test_only_the_named_layers_are_wrapped() -> None:
    case = fresh("residual")
    inputs = ModelInputs.of(case.inputs)
    graph = look_at(case.model, inputs)
    model = instrument(case.model, graph, inputs, ["b"], {"b": "bn2"})
    assert set(compressed_layers(model)) == {"b"}
    assert isinstance(model.bn1, nn.BatchNorm2d)
    compare(case, run(model, case), exact=False)


def test_half_precision_and_double_models() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        case = fresh("chain")
        case.model.to(dtype)
        case.inputs = case.inputs.to(dtype)
        model = instrumented(case, fuse=False)
        compare(case, run(model, case), exact=True)
        layer = compressed_layers(instrumented(case))["0"]
        held = torch.float32 if dtype == torch.bfloat16 else dtype
        assert layer.weight.dtype == layer.bias.dtype == held


def test_what_is_folded_into_a_bfloat16_layer_keeps_its_precision() -> None:
    case = fresh("chain")
    case.model.to(torch.bfloat16)
    case.inputs = case.inputs.to(torch.bfloat16)
    conv, bn = case.model[0], case.model[1]
    factor = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    layer = compressed_layers(instrumented(case))["0"]
    # Rounded once, to float32; bfloat16 would be off by up to 2^-9.
    expected = conv.weight.double() * factor.view(-1, 1, 1, 1)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=2**-23, atol=0)


def test_a_norm_without_affine_is_folded_exactly() -> None:
    net = nn.Sequential(conv(), norm()).eval().double()
    case = Case(net, image().double(), {"0"})
    found = run(instrumented(case), case)
    (expected,) = tensors_in(float_output(case))
    # float64 throughout: nothing but its rounding may differ.
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


def test_a_forward_that_differs_from_run_to_run_is_told() -> None:
    def flip(self: Any, x: Tensor) -> Tensor:
        self.runs = getattr(self, "runs", 0) + 1
        return self.a(x) if self.runs % 2 else x

    from graph.special_layers import StandardizedConv

    net = Net(flip, a=StandardizedConv(4, 4, 3, padding=1)).eval()
    inputs = ModelInputs.of(image())
    graph = look_at(net, inputs)
    net.runs = 1
    with pytest.raises(ModelError, match="'a' ran in one forward of the model and not in the next"):
        instrument(net, graph, inputs, ["a"], {})


class Box:
    """An object that cannot be looked into."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class HiddenReference(nn.Module):
    """Calls its BatchNorm through a helper object, in which it cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bn.running_var.fill_(9.0)
        self.box = Box(self.bn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.box.module(self.conv(x))


def test_module_that_cannot_be_replaced_everywhere_is_an_error() -> None:
    model = HiddenReference().eval()
    inputs = ModelInputs.of(torch.randn(2, 3, 8, 8))
    graph = look_at(model, inputs)
    with pytest.raises(ModelError, match=r"changes the float result.*not a submodule"):
        instrument(model, graph, inputs, ["conv"], {"conv": "bn"})
