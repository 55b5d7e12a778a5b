"""Networks that decomposition meets, and one that says what it did in a fresh process."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Containers with sparse and odd child names, residuals, layers that are not eligible."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.stages = nn.ModuleDict({"3x3 wide": nn.Conv2d(64, 128, 3, stride=2, padding=1)})
        self.stages["items-2"] = nn.Conv2d(128, 96, (3, 5), padding="same", bias=False)
        self.tail = nn.Sequential()
        self.tail.add_module("7", nn.Conv2d(96, 80, 3))
        self.tail.add_module("2", nn.ReLU())
        self.tail.add_module("grouped", nn.Conv2d(80, 80, 3, groups=2, padding=1))
        self.tail.add_module("dilated", nn.Conv2d(80, 80, 3, dilation=2, padding=2))
        self.head = nn.Conv2d(80, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for stage in self.stages.values():
            x = torch.relu(stage(x))
        return self.head(self.tail(x)).mean((2, 3))


DECOMPOSED = ["stem", "stages.3x3 wide", "stages.items-2", "tail.7"]


def trained(seed: int = 0) -> Net:
    """The network with weights that are nearly of low rank, as those of trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    net = Net().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            n, c, kh, kw = module.weight.shape
            left = torch.randn(c * kh, 12, generator=generator)
            right = torch.randn(12, n * kw, generator=generator)
            weight = (left @ right).reshape(c, kh, n, kw).permute(2, 0, 1, 3)
            noise = 0.3 * torch.randn(n, c, kh, kw, generator=generator)
            with torch.no_grad():
                module.weight.copy_((weight + noise) / (4 * (c * kh * kw) ** 0.5))
    return net


def image(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 48, 40, generator=torch.Generator().manual_seed(seed))
