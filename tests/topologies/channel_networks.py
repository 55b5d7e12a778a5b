"""Small networks, one for each structure through which channels are followed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    """Modules by name, and a function of them and the input."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


@dataclass(frozen=True)
class Case:
    """A network and what pruning half of its channels has to do.

    Attributes:
        build: makes the network.
        pruned: layers that lose channels.
        whole: layers that keep theirs, with a part of the reason given.
        inputs: makes the input.
        ratio: share that goes.
        exact: whether the network without some channels computes what the whole one does with
            them zeroed; statistics over channels do not.
    """

    build: Callable[[], nn.Module]
    pruned: tuple[str, ...]
    whole: tuple[tuple[str, str], ...] = ()
    inputs: Callable[[], Any] = lambda: torch.randn(IMAGE)
    ratio: float = 0.5


def conv(cin: int, cout: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **options)


def conv_bn(cin: int, cout: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(cin, cout, kernel, bias=False, **options), nn.BatchNorm2d(cout))


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def chain() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), nn.ReLU(), conv_bn(8, 12), nn.ReLU6(), nn.MaxPool2d(2), conv(12, 4)
    )


def residual() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        x = F.relu(m.b(F.relu(m.a(x))) + x)
        return m.head(pooled(x))

    return Net(run, stem=conv_bn(3, 8), a=conv_bn(8, 6), b=conv_bn(6, 8), head=nn.Linear(8, 5))


def residual_in_place() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.a(x)
        y += x
        return m.head(y.mul_(2).relu_())

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))


def concat() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.left(x), m.right(x)], dim=1)
        return m.head(F.relu(m.bn(x)))

    return Net(run, left=conv(3, 4, 1), right=conv(3, 8), bn=nn.BatchNorm2d(12), head=conv(12, 2))


def concat_into_residual() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.left(x), m.right(x)], dim=1) + m.whole(x))

    return Net(run, left=conv(3, 4, 1), right=conv(3, 8), whole=conv(3, 12), head=conv(12, 2))


def concat_with_the_input() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([x, m.a(x), x], 1))

    return Net(run, a=conv(3, 8), head=conv(14, 2))


def concat_of_the_same_tensor() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(torch.cat([x, x, F.relu(x)], 1))

    return Net(run, a=conv(3, 8), head=conv(24, 2))


def dense() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for layer in m.layers:
            x = torch.cat([x, layer(x)], 1)
        return m.head(x)

    layers = [
        nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), conv(8 + 4 * i, 4)) for i in range(3)
    ]
    return Net(run, stem=conv(3, 8), layers=nn.ModuleList(layers), head=conv(20, 2))


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), nn.ReLU6(), conv_bn(8, 8, groups=8), nn.ReLU6(), conv_bn(8, 12, 1),
        conv(12, 24, groups=12), conv(24, 2),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, 1), nn.ReLU(), conv_bn(16, 8, groups=2), nn.ReLU(), conv(8, 8, groups=4),
        conv(8, 2),
    )  # fmt: skip


def grouped_behind_concat() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.g(torch.cat([m.a(x), m.b(x)], 1)))

    return Net(run, a=conv(3, 8), b=conv(3, 8), g=conv(16, 8, groups=2), head=conv(8, 2))


def squeeze_excite(linear: bool = False) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if linear:
            s = torch.sigmoid(m.up(F.relu(m.down(pooled(x)))))
            return m.head(x * s[:, :, None, None])
        s = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
        return m.head(x * s)

    if linear:
        return Net(
            run, a=conv_bn(3, 16), down=nn.Linear(16, 4), up=nn.Linear(4, 16), head=conv(16, 2)
        )
    return Net(run, a=conv_bn(3, 16), down=conv(16, 4, 1), up=conv(4, 16, 1), head=conv(16, 2))


def attention_over_space() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(x * torch.sigmoid(m.mask(m.inner(x))))

    return Net(run, a=conv(3, 8), inner=conv(8, 4), mask=conv(4, 1), head=conv(8, 2))


def mean_over_channels() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        return m.head(x * torch.sigmoid(x.mean(1, keepdim=True)))

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))


def mean_by_hand() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        mean = x.sum(1, keepdim=True) / x.shape[1]
        return m.head(x * torch.sigmoid(mean))

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))


def scale_by_size() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        return m.head(x) * torch.full((1,), x.shape[1] ** -0.5)

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))


def scale_by_numpy() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        return m.head(x) / np.prod(x.shape[1:2])

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))


def slope_by_size() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        return F.leaky_relu(m.head(x), 1 / x.shape[1])

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))


def written_size() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        y = m.head(x).clone()
        y[:, 0] = x.shape[1]
        return y

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))


def scale_by_values() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        return m.head(x) / (1 + x.abs().sum().item())

    net = Net(run, stem=conv(3, 8), a=conv(8, 8), head=conv(8, 2))
    net.table = nn.Parameter(torch.ones(3, 1, dtype=torch.int8), requires_grad=False)
    return net


def reused_conv() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.relu(m.twice(F.relu(m.twice(m.before(x))))))

    return Net(run, stem=conv(3, 8), before=conv(8, 6), twice=conv(6, 6), head=conv(6, 2))


def tied_weights() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(F.relu(m.a(m.stem(x)))))

    a, b = conv(6, 6), conv(6, 6)
    b.weight = a.weight
    return Net(run, stem=conv(3, 6), a=a, b=b, head=nn.Sequential(conv(6, 4), conv(4, 2)))


def chunk_gate() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, dim=1)
        return m.head(a * torch.sigmoid(b))

    return Net(run, a=conv(3, 16), head=conv(8, 2))


def chunk_apart() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, dim=1)
        return m.left(a) + m.right(b)

    return Net(run, a=conv(3, 16), left=conv(8, 2), right=conv(8, 2))


def gated_linear_unit() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.GLU(dim=1), conv(8, 2))


def slice_by_size() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        half = x.shape[1] // 2
        return m.left(x[:, :half]) + m.right(x[:, half:])

    return Net(run, a=conv(3, 16), left=conv(8, 2), right=conv(8, 2))


def slice_by_number() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        return m.left(x[:, :8]) + m.right(x[:, 8:])

    return Net(run, stem=conv(3, 8), a=conv(8, 16), left=conv(8, 2), right=conv(8, 2))


def every_second() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x))
        return m.left(x[:, ::2]) + m.right(x[:, 1::2])

    return Net(run, stem=conv(3, 8), a=conv(8, 16), left=conv(8, 2), right=conv(8, 2))


def split_by_number() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = torch.split(m.a(m.stem(x)), [6, 10], 1)
        return m.left(a) + m.right(b)

    return Net(run, stem=conv(3, 8), a=conv(8, 16), left=conv(6, 2), right=conv(10, 2))


def flatten_to_linear() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 12), nn.ReLU(),
        nn.Linear(12, 4),
    )  # fmt: skip


def view_to_linear() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.a(x)), 2)
        return m.head(x.view(x.size(0), -1))

    return Net(run, a=conv(3, 8), head=nn.Linear(128, 4))


def view_by_number() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.a(m.stem(x))), 2)
        return m.head(x.view(-1, 128))

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=nn.Linear(128, 4))


def channels_last_linear() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).permute(0, 2, 3, 1)
        x = m.down(F.gelu(m.up(m.norm(x))))
        return m.head(x.permute(0, 3, 1, 2))

    return Net(
        run, a=conv(3, 8), norm=nn.LayerNorm(8), up=nn.Linear(8, 16), down=nn.Linear(16, 8),
        head=conv(8, 2),
    )  # fmt: skip


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def convnext_block() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.dw(x).permute(0, 2, 3, 1)
        y = m.scale(m.down(F.gelu(m.up(m.norm(y)))))
        return m.head(x + y.permute(0, 3, 1, 2))

    return Net(
        run, stem=conv(3, 8), dw=conv(8, 8, 7, groups=8), norm=nn.LayerNorm(8),
        up=nn.Linear(8, 32), down=nn.Linear(32, 8), scale=LayerScale(8), head=conv(8, 2),
    )  # fmt: skip


def bare_parameters() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x) * m.scale + m.shift[None])

    return Net(
        run, a=conv(3, 8), scale=nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5),
        shift=nn.Parameter(torch.randn(8, 1, 1)), head=conv(8, 2),
    )  # fmt: skip


def prelu() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 8), nn.PReLU(), conv(8, 2))


def group_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 8), nn.GroupNorm(1, 8),
        conv(8, 6), nn.GroupNorm(6, 6), conv(6, 2),
    )  # fmt: skip


def layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8),
        nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 6), nn.RMSNorm(6), nn.Linear(6, 2),
    )  # fmt: skip


def instance_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.InstanceNorm2d(8), nn.ReLU(), conv(8, 8), nn.InstanceNorm2d(8, affine=True),
        conv(8, 2),
    )  # fmt: skip


def transposed() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(),
        conv(6, 2),
    )  # fmt: skip


def transposed_grouped() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.dw(m.up(m.a(x)) + m.b(x)))

    return Net(
        run, a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 3, padding=1, groups=2), b=conv(3, 12),
        dw=nn.ConvTranspose2d(12, 12, 3, padding=1, groups=12), head=conv(12, 2),
    )  # fmt: skip


def unet() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        top = F.relu(m.down1(x))
        low = F.relu(m.down2(F.max_pool2d(top, 2)))
        up = F.interpolate(low, scale_factor=2, mode="bilinear")
        return m.head(F.relu(m.join(torch.cat([top, up], 1))))

    return Net(run, down1=conv_bn(3, 8), down2=conv_bn(8, 12), join=conv_bn(20, 8), head=conv(8, 2))


def pixel_shuffle() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 16), nn.PixelShuffle(2), conv(4, 2))


def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.PixelUnshuffle(2), conv(32, 2))


def channel_shuffle() -> nn.Module:
    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks:
            a, b = x.chunk(2, dim=1)
            x = shuffle(torch.cat([a, block(b)], 1))
        return m.head(x)

    blocks = [nn.Sequential(conv_bn(8, 8, 1), conv_bn(8, 8, groups=8)) for _ in range(2)]
    return Net(run, stem=conv(3, 16), blocks=nn.ModuleList(blocks), head=conv(16, 2))


class Attention(nn.Module):
    """Heads by number, as most write them, or by what is left."""

    def __init__(self, dim: int, heads: int, *, open_size: bool, fused: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.heads, self.size = heads, -1 if open_size else dim // heads
        self.scale = (dim // heads) ** -0.5
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            layer(x).view(n, t, self.heads, self.size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def attention(*, open_size: bool, fused: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), Attention(16, 2, open_size=open_size, fused=fused), nn.Linear(16, 2)
    )


def shared_heads() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 5, -1, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.head(y.transpose(1, 2).flatten(2))

    return Net(run, q=nn.Linear(6, 16), k=nn.Linear(6, 8), v=nn.Linear(6, 8), head=nn.Linear(16, 2))


def transformer() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        tokens = m.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([m.cls.expand(len(x), -1, -1), tokens], 1) + m.position
        for block in m.blocks:
            tokens = tokens + block.attention(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        return m.head(m.norm(tokens)[:, 0])

    blocks = [
        nn.ModuleDict(
            {
                "norm1": nn.LayerNorm(16),
                "attention": Attention(16, 2, open_size=i == 0),
                "norm2": nn.LayerNorm(16),
                "mlp": nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
            }
        )
        for i in range(2)
    ]
    for block in blocks:
        block.attention, block.mlp = block["attention"], block["mlp"]
        block.norm1, block.norm2 = block["norm1"], block["norm2"]
    return Net(
        run, patch=nn.Conv2d(3, 16, 4, 4), cls=nn.Parameter(torch.randn(1, 1, 16)),
        position=nn.Parameter(torch.randn(1, 5, 16)), blocks=nn.ModuleList(blocks),
        norm=nn.LayerNorm(16), head=nn.Linear(16, 3),
    )  # fmt: skip


def torch_attention() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.inside(x)
        return m.head(m.attention(x, x, x, need_weights=False)[0])

    return Net(
        run, inside=nn.Linear(6, 16), attention=nn.MultiheadAttention(16, 2, batch_first=True),
        head=nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)),
    )  # fmt: skip


def torch_encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 2))


def data_dependent_branch() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.before(m.stem(x)))
        x = m.left(x) if x.sum() > -1 else m.right(x)
        return m.head(F.relu(x))

    return Net(
        run, stem=conv(3, 8), before=conv(8, 8), left=conv(8, 8), right=conv(8, 8), head=conv(8, 2)
    )


def data_dependent_scale() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if x.abs().max() > 1e6:
            x = x / 2
        return m.head(x)

    return Net(run, a=conv(3, 8), head=conv(8, 2))


@torch.library.custom_op("amct_tests::mirror", mutates_args=())
def mirror(x: Tensor) -> Tensor:
    return x.flip(1).clone()


@mirror.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _mirrored_gradient(context: Any, gradient: Tensor) -> Tensor:
    return gradient.flip(1)


mirror.register_autograd(_mirrored_gradient)


def unknown_operator() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.b(F.relu(m.a(x)))
        x = torch.ops.amct_tests.mirror(x)
        return m.head(F.relu(m.c(x)))

    return Net(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=conv(8, 2))


def numpy_in_the_middle() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.b(F.relu(m.a(x)))
        x = torch.from_numpy(np.flip(x.detach().numpy(), 1).copy())
        return m.head(F.relu(m.c(x)))

    return Net(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=conv(8, 2))


def padded_shortcut() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return m.head(F.relu(short + m.b(F.relu(m.a(x)))))

    return Net(run, stem=conv(3, 8), a=conv(8, 8), b=conv(8, 12, stride=2), head=conv(12, 2))


def spatial_padding() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ZeroPad2d((0, 1, 0, 1)), nn.ReflectionPad2d(1), nn.Conv2d(8, 2, 3)
    )


def stack() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.stack([m.a(x), m.b(x)], dim=1)
        return m.head((x * torch.tensor([0.3, 0.7])[None, :, None, None, None]).sum(1))

    return Net(run, a=conv(3, 8), b=conv(3, 8), head=conv(8, 2))


def mixer() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2)
        x = x + m.tokens2(F.gelu(m.tokens1(x)))
        x = x.transpose(1, 2)
        x = x + m.channels2(F.gelu(m.channels1(x)))
        return m.head(x.mean(1))

    return Net(
        run, patch=nn.Conv2d(3, 8, 4, 4), tokens1=nn.Linear(4, 6), tokens2=nn.Linear(6, 4),
        channels1=nn.Linear(8, 16), channels2=nn.Linear(16, 8), head=nn.Linear(8, 2),
    )  # fmt: skip


def einsum() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k = m.q(x).flatten(2), m.k(x).flatten(2)
        weight = torch.softmax(torch.einsum("ncx,ncy->nxy", q, k), -1)
        y = torch.einsum("nxy,ncy->ncx", weight, m.v(x).flatten(2))
        return m.head(y)

    return Net(run, q=conv(3, 8), k=conv(3, 8), v=conv(3, 8), head=nn.Conv1d(8, 2, 1))


def gram_matrix() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(m.stem(x)).flatten(2)
        return m.head((x @ x.transpose(1, 2)).flatten(1))

    return Net(run, stem=conv(3, 6), a=conv(6, 4), head=nn.Linear(16, 2))


def language_model() -> nn.Module:
    def run(m: Any, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        y = m.norm(x)
        x = x + m.down(F.silu(m.gate(y)) * m.up(y))
        return m.head(x)

    return Net(
        run, embed=nn.Embedding(11, 8), norm=nn.RMSNorm(8), gate=nn.Linear(8, 16, bias=False),
        up=nn.Linear(8, 16, bias=False), down=nn.Linear(16, 8, bias=False), head=nn.Linear(8, 11),
    )  # fmt: skip


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / math.pi
        return self._conv_forward(x, weight, self.bias)


def computed_weight() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), conv(8, 6), StandardisedConv(6, 8, 3, padding=1), nn.ReLU(), conv(8, 6),
        conv(6, 2),
    )  # fmt: skip


def conv1d_and_3d() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.b(F.relu(m.a(x)))
        x = m.c(x[:, :, None])
        return m.head(x.flatten(1))

    return Net(
        run, a=conv(3, 8), b=conv(8, 8), c=nn.Conv3d(8, 4, (1, 3, 3)), head=nn.Linear(144, 2)
    )


def recurrent() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y, _ = m.lstm(m.b(F.relu(m.a(x))))
        return m.head(F.relu(m.c(y)))

    return Net(
        run, a=nn.Linear(6, 8), b=nn.Linear(8, 6), lstm=nn.LSTM(6, 6, batch_first=True),
        c=nn.Linear(6, 8), head=nn.Linear(8, 2),
    )  # fmt: skip


def two_outputs() -> nn.Module:
    def run(m: Any, x: Tensor) -> dict[str, Tensor]:
        x = m.stem(x)
        y = F.relu(m.a(x))
        return {"features": x, "logits": m.head(pooled(y))}

    return Net(run, stem=conv(3, 8), a=conv(8, 8), head=nn.Linear(8, 2))


def set_item() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        out = torch.zeros_like(y)
        out[:, :, ::2] = m.b(x)[:, :, ::2]
        return m.head(out + y)

    return Net(run, a=conv(3, 8), b=conv(3, 8), head=conv(8, 2))


def local_response_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), conv(8, 8), nn.LocalResponseNorm(2), conv(8, 2))


def sequence() -> Tensor:
    return torch.randn(2, 5, 6)


CASES: dict[str, Case] = {
    "chain": Case(chain, ("0.0", "2.0"), (("5", "model's output"),)),
    "residual": Case(residual, ("stem.0", "a.0", "b.0")),
    "residual_in_place": Case(residual_in_place, ("stem", "a")),
    "concat": Case(concat, ("left", "right")),
    "concat_into_residual": Case(concat_into_residual, ("left", "right", "whole")),
    "concat_with_the_input": Case(concat_with_the_input, ("a",)),
    "concat_of_the_same_tensor": Case(concat_of_the_same_tensor, ("a",)),
    "dense": Case(dense, ("stem", "layers.0.2", "layers.1.2", "layers.2.2")),
    "depthwise": Case(depthwise, ("0.0", "4.0"), (("2.0", "depthwise"), ("5", "depthwise"))),
    "grouped": Case(grouped, ("0.0", "2.0", "4")),
    "grouped_behind_concat": Case(grouped_behind_concat, ("a", "b", "g")),
    "squeeze_excite": Case(squeeze_excite, ("a.0", "down", "up")),
    "squeeze_excite_linear": Case(lambda: squeeze_excite(True), ("a.0", "down", "up")),
    "attention_over_space": Case(
        attention_over_space, ("a", "inner"), (("mask", "one channel"),)
    ),
    "mean_over_channels": Case(mean_over_channels, ("stem",), (("a", "mean"),)),
    "mean_by_hand": Case(mean_by_hand, ("stem",), (("a", "number of its channels"),)),
    "scale_by_size": Case(scale_by_size, ("stem",), (("a", "number of its channels"),)),
    "scale_by_numpy": Case(scale_by_numpy, ("stem",), (("a", "number of its channels"),)),
    "slope_by_size": Case(slope_by_size, ("stem",), (("a", "number of its channels"),)),
    "written_size": Case(written_size, ("stem",), (("a", "number of its channels"),)),
    "scale_by_values": Case(scale_by_values, ("stem", "a")),
    "reused_conv": Case(reused_conv, ("stem",), (("before", "reused layer"), ("twice", "reused"))),
    "tied_weights": Case(tied_weights, ("head.0",), (("stem", "reused layer"), ("a", "reused"))),
    "chunk_gate": Case(chunk_gate, ("a",)),
    "chunk_apart": Case(chunk_apart, ("a",)),
    "gated_linear_unit": Case(gated_linear_unit, ("0",)),
    "slice_by_size": Case(slice_by_size, ("a",)),
    "slice_by_number": Case(slice_by_number, ("stem",), (("a", "channels"),)),
    "every_second": Case(every_second, ("stem",), (("a", "channels"),)),
    "split_by_number": Case(split_by_number, ("stem",), (("a", "split"),)),
    "flatten_to_linear": Case(flatten_to_linear, ("0.0", "4")),
    "view_to_linear": Case(view_to_linear, ("a",)),
    "view_by_number": Case(view_by_number, ("stem",), (("a", "view"),)),
    "channels_last_linear": Case(channels_last_linear, ("a", "up", "down")),
    "convnext_block": Case(convnext_block, ("stem", "up", "down"), (("dw", "depthwise"),)),
    "bare_parameters": Case(bare_parameters, ("a",)),
    "prelu": Case(prelu, ("0", "2")),
    "group_norm": Case(group_norm, ("0", "3", "5")),
    "layer_norm": Case(layer_norm, ("0", "3", "5"), inputs=lambda: torch.randn(4, 6)),
    "instance_norm": Case(instance_norm, ("0", "3")),
    "transposed": Case(transposed, ("0.0",), (("2", "of themselves"),)),
    "transposed_grouped": Case(transposed_grouped, ("a", "up", "b")),
    "unet": Case(unet, ("down1.0", "down2.0", "join.0")),
    "pixel_shuffle": Case(pixel_shuffle, ("0", "2")),
    "pixel_unshuffle": Case(pixel_unshuffle, ("0",)),
    "channel_shuffle": Case(
        channel_shuffle, ("stem", "blocks.0.0.0", "blocks.1.0.0")
    ),
    "attention_by_number": Case(
        lambda: attention(open_size=False), ("0", "1.out"), (("1.q", "view"), ("1.v", "view")),
        sequence,
    ),
    "attention_open": Case(
        lambda: attention(open_size=True), ("0", "1.q", "1.k", "1.v", "1.out"), (), sequence
    ),
    "attention_fused": Case(
        lambda: attention(open_size=True, fused=True), ("0", "1.q", "1.k", "1.v", "1.out"), (),
        sequence,
    ),
    "shared_heads": Case(shared_heads, ("q", "k", "v"), (), sequence),
    "transformer": Case(
        transformer,
        ("patch", "blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.0.attention.q",
         "blocks.0.attention.out", "blocks.1.attention.out", "blocks.1.mlp.2"),
        (("blocks.1.attention.q", "view"),),
    ),
    "torch_attention": Case(
        torch_attention, ("head.0",), (("inside", "attention"),), sequence
    ),
    "torch_encoder": Case(torch_encoder, ("0.linear1",), (), lambda: torch.randn(2, 5, 16)),
    "data_dependent_branch": Case(
        data_dependent_branch, ("stem",), (("before", "branch"), ("left", "branch"))
    ),
    "data_dependent_scale": Case(data_dependent_scale, ("a",)),
    "unknown_operator": Case(unknown_operator, ("a", "c"), (("b", "mirror"),)),
    "numpy_in_the_middle": Case(numpy_in_the_middle, ("a", "c"), (("b", "numpy"),)),
    "padded_shortcut": Case(padded_shortcut, ("stem", "a", "b")),
    "spatial_padding": Case(spatial_padding, ("0",)),
    "stack": Case(stack, ("a", "b")),
    "mixer": Case(mixer, ("patch", "channels1", "channels2")),
    "einsum": Case(einsum, ("q", "k", "v")),
    "gram_matrix": Case(gram_matrix, ("stem",), (("a", "pairs"),)),
    "language_model": Case(
        language_model, ("gate", "up", "down"), (), lambda: torch.randint(0, 11, (2, 5))
    ),
    "computed_weight": Case(
        computed_weight, ("0", "4"), (("1", "computed"), ("2", "computed"))
    ),
    "conv1d_and_3d": Case(conv1d_and_3d, ("a", "b"), (("c", "of themselves"),)),
    "recurrent": Case(recurrent, ("a", "c"), (("b", "lstm"),), sequence),
    "two_outputs": Case(two_outputs, ("a",), (("stem", "output"), ("head", "output"))),
    "set_item": Case(set_item, ("a", "b")),
    "local_response_norm": Case(
        local_response_norm, ("0",), (("1", "local_response_norm"),)
    ),
}  # fmt: skip
