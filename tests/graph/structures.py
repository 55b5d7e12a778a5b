"""Small networks: how layers are connected and called."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from graph.cases import CASES, Case, Net, conv, image, lively, norm, structure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# --- plain structures ------------------------------------------------------------------------


@structure
def chain() -> Case:
    net = nn.Sequential(
        conv(), norm(), nn.ReLU(), conv(stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    return Case(net, image(), {"0", "3", "6"}, fused={"0": "1"})


@structure
def residual() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        y = self.bn2(self.b(F.relu(self.bn1(self.a(x)))))
        return F.relu(y + self.bn3(self.shortcut(x)))

    net = Net(run, a=conv(), bn1=norm(), b=conv(), bn2=norm(), shortcut=conv(kernel=1), bn3=norm())
    fused = {"a": "bn1", "b": "bn2", "shortcut": "bn3"}
    return Case(net, image(), {"a", "b", "shortcut"}, fused=fused)


@structure
def concat() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.a(x), self.b(x)], dim=1))

    net = Net(run, a=conv(), b=conv(), bn=norm(8))
    return Case(net, image(), {"a", "b"})


@structure
def several_inputs_and_outputs() -> Case:
    def run(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = self.bn(self.a(x))
        return a, self.b(y) + a

    return Case(
        Net(run, a=conv(), b=conv(), bn=norm()), (image(), image()), {"a", "b"}, fused={"a": "bn"}
    )


@structure
def keyword_inputs() -> Case:
    def run(self: Any, *, picture: Tensor, scale: Tensor) -> Tensor:
        return self.a(picture) * scale

    return Case(Net(run, a=conv()), {"scale": torch.tensor(2.0), "picture": image()}, {"a"})


@structure
def dict_output() -> Case:
    """The first convolution's output is an output of the model: its BN cannot be folded."""

    def run(self: Any, x: Tensor) -> OrderedDict[str, Any]:
        y = self.a(x)
        return OrderedDict(raw=y, normed=[self.bn(y), self.bn2(self.b(x))])

    net = Net(run, a=conv(), bn=norm(), b=conv(), bn2=norm())
    return Case(net, image(), {"a", "b"}, fused={"b": "bn2"})


@dataclass
class Outputs:
    raw: Tensor
    normed: Tensor


@structure
def dataclass_output() -> Case:
    def run(self: Any, x: Tensor) -> Outputs:
        y = self.a(x)
        return Outputs(y, self.bn(y))

    return Case(Net(run, a=conv(), bn=norm()), image(), {"a"})


@structure
def nested_inputs() -> Case:
    def run(self: Any, pair: tuple[Tensor, dict[str, list[Tensor]]]) -> Tensor:
        x, rest = pair
        return self.a(x) + self.b(rest["images"][1])

    inputs = ((image(), {"images": [image(), image()]}),)
    return Case(Net(run, a=conv(), b=conv()), inputs, {"a", "b"})


@structure
def control_flow() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        for layer in self.steps:
            x = layer(x) if x.shape[1] == 4 else x
        return self.never(x) if x.sum() > 1e9 else x

    net = Net(run, steps=nn.ModuleList([conv(), conv(cout=6)]), never=conv(6))
    return Case(net, image(), {"steps.0", "steps.1"}, {"never": "did not run on input_data"})


# --- what stands between a convolution and its BatchNorm -----------------------------------------


@structure
def in_place_between() -> Case:
    net = nn.Sequential(conv(), nn.ReLU(inplace=True), norm(), conv(), norm())
    return Case(net, image(), {"0", "3"}, fused={"3": "4"})


@structure
def assignment_between() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0] = 0.0
        return self.bn(y)

    return Case(Net(run, a=conv(), bn=norm()), image(), {"a"})


@structure
def read_twice() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.bn(y) + y

    return Case(Net(run, a=conv(), bn=norm()), image(), {"a"})


@structure
def norm_before_conv() -> Case:
    return Case(nn.Sequential(norm(), conv(), nn.ReLU()), image(), {"1"})


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that also activates, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


@structure
def activating_norm() -> Case:
    net = nn.Sequential(conv(), lively(NormAct(4)), conv())
    return Case(net, image(), {"0", "2"}, fused={"0": "1"})


class PlusOneNorm(nn.BatchNorm2d):
    """Uses another weight than the one it holds."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, 1 + self.weight, self.bias, False, 0.0, self.eps)


class BatchStatisticsNorm(nn.BatchNorm2d):
    """Uses the batch's statistics in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


@structure
def norms_that_cannot_be_folded() -> Case:
    plain = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(
        conv(), lively(PlusOneNorm(4)), conv(), lively(BatchStatisticsNorm(4)), conv(), plain
    )
    return Case(net, image(), {"0", "2", "4"})


@structure
def norm_without_affine() -> Case:
    bn = nn.BatchNorm2d(4, affine=False, eps=0.1)
    bn.running_mean.uniform_(-1, 1)
    bn.running_var.uniform_(0.5, 2)
    return Case(nn.Sequential(conv(bias=False), bn), image(), {"0"}, fused={"0": "1"})


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


@structure
def custom_function_between() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.b(self.bn(Doubled.apply(self.a(x))))

    return Case(Net(run, a=conv(), bn=norm(), b=conv()), image(), {"a", "b"})


# --- ways to call ----------------------------------------------------------------------------


def checkpointed(use_reentrant: bool) -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.a(x), use_reentrant=use_reentrant)

    net = Net(run, a=conv(), block=nn.Sequential(conv(), norm()))
    return Case(net, image(), {"a", "block.0"}, fused={"block.0": "block.1"})


for _reentrant in (False, True):
    CASES[f"checkpoint_reentrant_{_reentrant}"] = partial(checkpointed, _reentrant)


@structure
def failing_branch_that_is_caught() -> Case:
    """A module that raises and is caught must not be taken for still running."""

    def refuse(self: Any, x: Tensor) -> Tensor:
        self.inner(x)
        raise ValueError("no")

    def run(self: Any, x: Tensor) -> Tensor:
        try:
            return self.first(x)
        except ValueError:
            return self.bn(self.a(x))

    net = Net(run, first=Net(refuse, inner=conv()), a=conv(), bn=norm())
    left_out = {"first.inner": "its output is not used"}
    return Case(net, image(), {"a"}, left_out, fused={"a": "bn"})


@structure
def multihead_attention() -> Case:
    def run(self: Any, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        return self.fc(y)

    net = Net(run, attention=nn.MultiheadAttention(8, 2, batch_first=True), fc=nn.Linear(8, 8))
    reasons = {"attention.out_proj": "did not run; .*multi_head_attention.* read its parameters"}
    return Case(net, image(2, 5, 8), {"fc"}, reasons)


@structure
def transformer_layer() -> Case:
    """In eval mode torch would run one fused kernel instead of the layer's Linears."""
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    reasons = {"0.self_attn.out_proj": "did not run"}
    return Case(net, image(2, 5, 8), {"0.linear1", "0.linear2"}, reasons)


@structure
def model_is_a_layer() -> Case:
    return Case(conv(), image(), set(), {"": "the model itself is this layer"})
