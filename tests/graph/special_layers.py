"""Small networks: layers with a forward of their own, and layers used more than once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from graph.cases import Case, Net, conv, image, norm, structure
from torch import Tensor, nn

# --- layers that do more than their base class -------------------------------------------------


class PaddingConv(nn.Conv2d):
    """Pads for itself, as TensorFlow's 'same' does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


@structure
def padding_subclass() -> Case:
    net = nn.Sequential(PaddingConv(4, 6, 3, stride=2), norm(6), PaddingConv(6, 4, 2))
    return Case(net, image(), {"0", "2"}, fused={"0": "1"})


class StandardizedConv(nn.Conv2d):
    """Standardises its weight in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input=x, weight=w, bias=self.bias, padding=self.padding)


@structure
def weight_standardisation() -> Case:
    net = nn.Sequential(StandardizedConv(4, 4, 3, padding=1), norm(), nn.ReLU(), conv())
    return Case(net, image(), {"0", "3"}, fused={"0": "1"})


@structure
def parametrized_weight() -> Case:
    layer = nn.utils.parametrizations.weight_norm(conv())
    return Case(nn.Sequential(layer, norm(), conv()), image(), {"0", "2"}, fused={"0": "1"})


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()


class BinaryConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, Sign.apply(self.weight), self.bias, padding=self.padding)


@structure
def weight_from_custom_function() -> Case:
    return Case(nn.Sequential(BinaryConv(4, 4, 3, padding=1)), image(), {"0"})


class DynamicConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


@structure
def weight_from_the_input() -> Case:
    net = nn.Sequential(DynamicConv(4, 4, 3), conv())
    return Case(net, image(), {"1"}, {"0": "computed from the model's input"})


class TwoCalls(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) + F.conv2d(x * 2, self.weight)


@structure
def two_calls_in_one_forward() -> Case:
    net = nn.Sequential(TwoCalls(4, 4, 3))
    return Case(net, image(), set(), {"0": "called conv2d 2 times; exactly one"})


class Delegating(nn.Linear):
    """A Linear whose work another Linear inside it does."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n)
        self.inner = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@structure
def layer_inside_a_layer() -> Case:
    net = nn.Sequential(Delegating(8))
    return Case(net, image(3, 8), {"0.inner"}, {"0": "its call is made by layer '0.inner'"})


@structure
def padding_mode() -> Case:
    net = nn.Sequential(conv(padding_mode="reflect"), conv(padding_mode="circular"))
    return Case(net, image(), set(), {"0": "'reflect'", "1": "'circular'"})


@structure
def ranks() -> Case:
    def run(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.single(x[0]), self.tokens(x.flatten(2)), self.vector(x.mean((0, 2, 3)))

    net = Net(run, single=conv(), tokens=nn.Linear(64, 3), vector=nn.Linear(4, 3))
    left_out = {"single": "3-D; supported is 4-D", "vector": "1-D; supported is 2-D to 6-D"}
    return Case(net, image(), {"tokens"}, left_out)


# --- reuse -------------------------------------------------------------------------------------


@structure
def functional_use_of_a_parameter() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.b(F.conv2d(x, self.a.weight, self.a.bias))

    net = Net(run, a=conv(), b=conv())
    return Case(net, image(), {"b"}, {"a": "did not run; conv2d read its parameters directly"})


@structure
def weight_read_by_another_call() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.a(x) * self.a.weight.mean()

    return Case(Net(run, a=conv()), image(), set(), {"a": "weight is also read by mean"})


@structure
def called_twice() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.once(self.twice(self.twice(x)))

    net = Net(run, twice=conv(), once=conv())
    return Case(net, image(), {"once"}, {"twice": "ran 2 times"})


@structure
def norm_called_twice() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.bn(self.b(self.bn(self.a(x))))

    return Case(Net(run, a=conv(), b=conv(), bn=norm()), image(), {"a", "b"})


@structure
def tied_weights() -> Case:
    net = nn.Sequential(conv(), conv(), conv())
    net[2].weight = net[0].weight
    reasons = {"0": "shares memory with '2.weight'", "2": "shares memory with '0.weight'"}
    return Case(net, image(), {"1"}, reasons)


@structure
def overlapping_views_of_one_storage() -> Case:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    net[2].weight = nn.Parameter(net[0].weight.detach().t())
    reasons = {"0": "shares memory with '2.weight'", "2": "shares memory with '0.weight'"}
    return Case(net, image(3, 6), {"1"}, reasons)


@structure
def disjoint_views_of_one_storage() -> Case:
    """Parameters that lie side by side in one flat buffer are not shared."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(flat, net.parameters())
    return Case(net, image(3, 6), {"0", "1"})


@structure
def two_names() -> Case:
    """Modules under two names, run once by the second; the first one names them."""
    net = Net(lambda self, x: self.second(x), first=conv(), second=nn.Sequential(), b=conv())
    net.second = nn.Sequential(net.first, norm(), nn.ReLU(), net.b)
    return Case(net, image(), {"first", "second.3"}, fused={"first": "second.1"})


@structure
def norm_under_two_names() -> Case:
    net = Net(lambda self, x: self.post(self.a(x)), a=conv(), bn=norm())
    net.post = nn.Sequential(net.bn, nn.ReLU())
    return Case(net, image(), {"a"}, fused={"a": "bn"})


@structure
def modules_in_a_plain_list() -> Case:
    """The forward reaches its modules by a Python list and a dict beside their names."""

    def run(self: Any, x: Tensor) -> Tensor:
        for module in self.order:
            x = module(x)
        return self.table["last"](x)

    net = Net(run, a=conv(), bn=norm(), b=conv())
    net.order = [net.a, net.bn]
    net.table = {"last": net.b}
    return Case(net, image(), {"a", "b"}, fused={"a": "bn"})
