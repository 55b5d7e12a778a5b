"""Small networks, one for each structure that is supported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SamePadConv(nn.Conv2d):
    """Pads for itself, as convolutions ported from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            F.pad(x, (0, 1, 0, 1)),
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )


class StandardisedConv(nn.Conv2d):
    """Computes the weight of its call from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that also activates."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def conv_bn(cin: int, cout: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, bias=False, **options), nn.BatchNorm2d(cout))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_bn(8, 16, stride=2), nn.ReLU6())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.left, self.right = conv_bn(8, 4, 1), conv_bn(8, 6, 3)
        self.join = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.join(torch.cat([self.left(x), F.relu(self.right(x))], 1))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = conv_bn(3, 12, 1), conv_bn(12, 12, groups=12)
        self.project, self.grouped = conv_bn(12, 8, 1), nn.Conv2d(8, 8, 3, groups=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depth(F.relu6(self.expand(x))))
        return self.grouped(self.project(x))


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pad = SamePadConv(3, 8, 3, stride=2)
        self.norm = NormAct(8)
        self.standard = StandardisedConv(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.standard(self.norm(self.pad(x)))))


class TwoInputsTwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.a(image)) * torch.sigmoid(self.b(mask))
        return {"features": features, "logits": self.head(features.mean((2, 3)))}


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"b{i}": conv_bn(4, 4) for i in range(3)})
        self.stem, self.never = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        x = self.stem(x)
        if x.shape[1] > 100:
            x = self.never(x)
        for name, block in self.blocks.items():
            if deep or name == "b0":
                x = F.silu(block(x)) + x
        return x


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.tied_a, self.tied_b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied_b.weight = self.tied_a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(self.once(x))))
        return self.tied_b(torch.relu(self.tied_a(x.mean((2, 3)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out, self.norm = nn.Linear(16, 16, bias=False), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(mixed))
        return x + self.down(F.gelu(self.up(x)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn(3, 8)
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(x * gate)


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = conv_bn(3, 8), conv_bn(4, 4), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        a, b = x.chunk(2, 1)
        x = torch.cat([a, F.relu(self.branch(b))], 1)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class PreNorm(nn.Module):
    """BN before the convolution, and a convolution whose output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.conv(F.relu(self.bn(x))))


@dataclass(frozen=True)
class Topology:
    """One network with example inputs and what is known of it.

    Attributes:
        build: makes the network.
        shapes: of its inputs.
        quantized: how many layers can be quantized.
        floats: layers that cannot, with a part of the reason.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    quantized: int
    floats: tuple[tuple[str, str], ...] = ()


IMAGE = ((4, 3, 16, 16),)
TOPOLOGIES = {
    "chain": Topology(Chain, IMAGE, 3),
    "residual": Topology(Residual, IMAGE, 4),
    "concat": Topology(Concat, IMAGE, 4),
    "depthwise, groups and dilation": Topology(Depthwise, IMAGE, 4),
    "conv and BN subclasses": Topology(Subclasses, IMAGE, 2),
    "two inputs, two outputs": Topology(TwoInputsTwoOutputs, ((4, 3, 16, 16), (4, 1, 16, 16)), 3),
    "control flow": Topology(ControlFlow, IMAGE, 4, (("never", "did not run"),)),
    "reused and tied layers": Topology(
        Reused,
        IMAGE,
        1,
        (("twice", "ran 2 times"), ("tied_a", "shares memory"), ("tied_b", "shares memory")),
    ),
    "attention": Topology(Attention, ((2, 6, 16),), 6),
    "squeeze and excite": Topology(SqueezeExcite, IMAGE, 4),
    "channel shuffle": Topology(Shuffle, IMAGE, 3),
    "BN before conv": Topology(PreNorm, IMAGE, 3),
}


def trained_like(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Gives BatchNorms statistics of real data, as in a trained network; eval mode."""
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(*inputs)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model.eval()
