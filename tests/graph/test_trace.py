"""The list of calls over values that one run of a model leaves."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph.networks import Net, conv, image, norm
from torch import Tensor, nn

from amct_pytorch.graph.tensors import ModelInputs, map_tensors, tensors_in
from amct_pytorch.graph.trace import OpCall, Operand, Trace, trace_forward


def trace_of(run: Any, inputs: Any = None, **modules: nn.Module) -> Trace:
    net = Net(run, **modules).eval()
    return trace_forward(net, ModelInputs.of(image() if inputs is None else inputs))


def calls(trace: Trace, function: str) -> list[OpCall]:
    return [op for op in trace.ops if op.function == function]


def test_values_link_calls() -> None:
    trace = trace_of(lambda self, x: F.relu(self.b(self.a(x))) + x, a=conv(), b=conv())
    a, b = calls(trace, "conv2d")
    (relu,) = calls(trace, "relu")
    (add,) = [op for op in trace.ops if op.function in ("add", "__add__")]
    assert b.inputs[0] == a.outputs[0]
    assert relu.inputs == b.outputs
    assert add.inputs == (relu.outputs[0], a.inputs[0])
    assert trace.outputs == add.outputs
    assert trace.consumers(a.inputs[0]) == [a, add]


def test_scopes_are_the_running_modules_outermost_first() -> None:
    trace = trace_of(
        lambda self, x: self.block(x).abs(), block=nn.Sequential(nn.Sequential(conv()))
    )
    assert calls(trace, "conv2d")[0].scopes == ("", "block", "block.0", "block.0.0")
    assert calls(trace, "abs")[0].scopes == ("",)
    assert trace.runs == {"": 1, "block": 1, "block.0": 1, "block.0.0": 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.relu_(),
        lambda y: torch.add(y, 1, out=y),
        lambda y: y.__iadd__(1),
        lambda y: y.__setitem__(0, 1.0),
        lambda y: y.copy_(torch.zeros_like(y)),
    ],
    ids=["method", "out", "operator", "assignment", "copy"],
)
def test_changing_a_tensor_in_place_ends_its_value(change: Any) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        change(y)
        return y.sigmoid()

    trace = trace_of(run, a=conv())
    (before,) = calls(trace, "conv2d")[0].outputs
    (after,) = calls(trace, "sigmoid")[0].inputs
    assert after != before
    assert after in trace.from_input
    assert all(op.function != "sigmoid" for op in trace.consumers(before))


def test_operands_name_parameters_and_keep_other_arguments() -> None:
    layer = conv(stride=2)
    trace = trace_of(lambda self, x: F.conv2d(x, self.a.weight, bias=None, stride=3), a=layer)
    (op,) = calls(trace, "conv2d")
    weight = op.argument(1, "weight")
    assert isinstance(weight, Operand)
    assert (weight.parameter, weight.shape) == ("a.weight", (4, 4, 3, 3))
    assert op.argument(2, "bias") is None
    assert op.argument(3, "stride") == 3
    assert op.argument(6, "groups") is None
    assert trace.parameter_values == {"a.weight": weight.value}


def test_only_what_depends_on_the_input_is_marked() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        constant = torch.ones(4, 1, 1).mul(2) * self.a.bias.abs().view(-1, 1, 1)
        return self.a(x).clamp(max=1) * constant

    trace = trace_of(run, a=conv())
    for function, depends in (("conv2d", True), ("clamp", True), ("abs", False), ("view", False)):
        (op,) = calls(trace, function)
        assert (op.outputs[0] in trace.from_input) is depends, function
    assert set(trace.outputs) <= trace.from_input


def test_several_results_are_several_values() -> None:
    trace = trace_of(
        lambda self, x: [self.a(part) for part in x.split(4, 1)], image(1, 8, 4, 4), a=conv()
    )
    (split,) = calls(trace, "split")
    assert [op.inputs[0] for op in calls(trace, "conv2d")] == list(split.outputs)
    assert len(set(trace.outputs)) == 2


def test_a_list_of_tensors_as_argument() -> None:
    trace = trace_of(lambda self, x: torch.cat([x, self.a(x)]), a=conv())
    (cat,) = calls(trace, "cat")
    operands = cat.argument(0, "tensors")
    assert [operand.value for operand in operands] == list(cat.inputs)
    assert cat.inputs[1] == calls(trace, "conv2d")[0].outputs[0]


def test_mode_and_gradient_state_of_the_run() -> None:
    seen = []

    def run(self: Any, x: Tensor) -> Tensor:
        seen.append((self.training, torch.is_grad_enabled()))
        return self.bn(x)

    trace_of(run, bn=norm())
    assert seen == [(False, False)]
    assert torch.is_grad_enabled()


def test_hooks_are_gone_after_a_failure() -> None:
    net = Net(lambda self, x: self.a(x), a=conv(3))
    with pytest.raises(Exception, match="cannot be run"):
        trace_forward(net, ModelInputs.of(image()))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_tensors_and_their_replacement_in_nested_values() -> None:
    a, b, c = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    nested = {"x": [a, (b, "text")], "y": {"z": c}, "n": 5, "none": None}
    assert [int(t) for t in tensors_in(nested)] == [1, 2, 3]
    changed = map_tensors(nested, lambda t: t * 10)
    assert [int(t) for t in tensors_in(changed)] == [10, 20, 30]
    assert changed["x"][1][1] == "text"
    assert type(changed["x"][1]) is tuple
    pair = torch.max(torch.tensor([[1.0, 2.0]]), dim=1)
    assert map_tensors(pair, lambda t: t + 1).indices.tolist() == [2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "input_data is a int; allowed are"),
        (None, "input_data is a NoneType"),
        ((), "holds no tensor"),
        ({"x": [1, 2]}, "holds no tensor"),
    ],
)
def test_input_data_that_is_none(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ModelInputs.of(data)


def test_input_data_in_each_allowed_form() -> None:
    x = torch.ones(2)

    class Echo(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    for data, args, kwargs in (
        (x, (x,), {}),
        ([x, x], (x, x), {}),
        ((x, None), (x, None), {}),
        ({"b": x}, (), {"b": x}),
    ):
        assert ModelInputs.of(data).call(Echo()) == (args, kwargs)
