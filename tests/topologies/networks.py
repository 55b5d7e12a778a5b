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


class Signal(nn.Module):
    """A 1-D network with every option of its layers, a residual addition and a way up again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(4, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8))
        self.deep = nn.Sequential(nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=4), nn.ReLU())
        self.branch = nn.Conv1d(8, 8, 1)
        self.up = nn.Sequential(
            nn.ConvTranspose1d(8, 6, 4, 2, 1, 1, groups=2, bias=False), nn.BatchNorm1d(6)
        )
        self.out = nn.ConvTranspose1d(6, 4, 3, dilation=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.max_pool1d(F.relu(x + self.branch(self.deep(x))), 2)
        return self.head(self.out(F.relu(self.up(x))).mean(2))


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


class Transposed(nn.Module):
    """Transposed convolutions: groups, output_padding, dilation, BN, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 4, 2, 1, output_padding=1, groups=4)
        self.bn = nn.BatchNorm2d(12)
        self.wide = nn.ConvTranspose2d(12, 6, 3, dilation=2, bias=False)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(F.relu(self.bn(self.up(F.relu(self.stem(x)))))))


class Volume(nn.Module):
    """Convolutions in three dimensions: explicit padding, BN, groups, stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv3d(2, 8, 3, bias=False), nn.BatchNorm3d(8)
        self.grouped = nn.Conv3d(8, 8, 3, stride=2, padding=(0, 1, 2), groups=4)
        self.dilated = nn.Conv3d(8, 8, 2, dilation=(2, 1, 1))
        self.head = nn.Conv3d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(F.pad(x, (1, 1, 1, 1, 1, 1)))))
        return self.head(self.dilated(F.relu(self.grouped(x))))


class Pools(nn.Module):
    """Average pools: padded, counting the padding or not, with ceil_mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.padded = nn.AvgPool2d(3, stride=2, padding=1)
        self.inside = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.ceil = nn.AvgPool2d(3, stride=2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(self.padded(torch.tanh(self.stem(x))))
        return self.head(self.ceil(x))


class Matrices(nn.Module):
    """Linear layers on inputs of any rank, with and without bias, permuted in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 6, bias=False)
        self.across, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.gelu(self.first(x)))
        return self.head(F.relu(self.across(x.transpose(-1, -2))))


@dataclass
class Detections:
    boxes: Tensor
    extra: dict[str, Tensor]


class Outputs(nn.Module):
    """Keyword inputs, an input left out, a dataclass that holds a dict, layers in nested lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.branches = nn.ModuleList(
            [
                nn.ModuleDict({"box": nn.Conv2d(8, 4, 1)}),
                nn.ModuleDict({"score": nn.Sequential(nn.ReLU(), nn.Conv2d(8, 2, 1))}),
            ]
        )

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Detections:
        x = F.relu(self.stem(image))
        if mask is not None:
            x = x * mask
        return Detections(self.branches[0]["box"](x), {"score": self.branches[1]["score"](x)})


class Functional(nn.Module):
    """Operators called on parameters directly stay float; the layers beside them do not."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.matrix = nn.Parameter(torch.randn(10, 8) * 0.3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding=1))
        return F.linear(self.conv(x).mean((2, 3)), self.matrix)


class DeadChannels(nn.Module):
    """BN that has shut channels off, and one whose weights are next to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.conv.weight[1].zero_()
            self.conv.weight[2].mul_(1e-9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))))


class Parametrised(nn.Module):
    """Weights that are computed: weight_norm and spectral_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """A GRU stays float; the Linear layers around it do not."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gru = nn.Linear(16, 12), nn.GRU(12, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(torch.tanh(self.into(x)))[0])


class Encoder(nn.Module):
    """torch's own transformer encoder layer, with its fast path for inference."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


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
    "transposed convolutions": Topology(Transposed, IMAGE, 4),
    "3-D convolutions": Topology(
        Volume, ((2, 2, 9, 8, 10),), 3, (("dilated", "dilation in depth is 2"),)
    ),
    "average pools": Topology(Pools, IMAGE, 5),
    **{
        f"Linear on {rank}-D inputs, transposed in between": Topology(
            Matrices, ((*[2] * (rank - 2), 5, 16),), 4
        )
        for rank in (2, 3, 4, 5, 6)
    },
    "optional inputs, dataclass of dict outputs, nested lists": Topology(Outputs, IMAGE, 3),
    "functional operators on parameters": Topology(Functional, IMAGE, 1),
    "channels shut off by BN or by their weights": Topology(DeadChannels, IMAGE, 2),
    "weight_norm and spectral_norm": Topology(Parametrised, IMAGE, 2),
    "GRU between Linear layers": Topology(Recurrent, ((2, 6, 16),), 2),
    "TransformerEncoderLayer": Topology(
        Encoder, ((2, 6, 16),), 3, (("block.self_attn.out_proj", "did not run"),)
    ),
}


# These only in training: calibration leaves 1-D convolutions in float.
TRAINED_TOPOLOGIES = {
    "1-D convolutions": Topology(Signal, ((2, 4, 33),), 6),
}


def trained_like(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Gives BatchNorms statistics of real data, as in a trained network; eval mode."""
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(*inputs)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model.eval()
