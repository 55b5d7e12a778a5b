"""Small networks to search, and what a search needs beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import amct_pytorch as amct


class Small(nn.Module):
    """A residual, a concatenation, a depthwise convolution, a flatten and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.a = nn.Conv2d(32, 48, 3, padding=1)
        self.b = nn.Conv2d(48, 32, 3, padding=1)
        self.left, self.right = nn.Conv2d(32, 24, 1), nn.Conv2d(32, 40, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=64)
        self.up = nn.ConvTranspose2d(64, 8, 2, 2)
        self.hidden = nn.Linear(8 * 64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = self.depthwise(torch.cat([self.left(x), torch.relu(self.right(x))], 1))
        return self.head(torch.relu(self.hidden(self.up(torch.relu(x)).flatten(1))))


def small() -> nn.Module:
    torch.manual_seed(4)
    return Small().eval()


def data(number: int = 6) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 8, 8, generator=chance)
    labels = torch.randint(0, 10, (number,), generator=chance)
    return [images, nn.functional.one_hot(labels, 10).float()]


def search(model, text, input_data=None, **plugins) -> str:
    """Runs a search in the working directory and returns the .cfg that it writes."""
    Path("search.cfg").write_text(text)
    given = data() if input_data is None else input_data
    amct.auto_channel_prune_search(model, "search.cfg", given, "found.cfg", **plugins)
    return Path("found.cfg").read_text()


def prune(model, cfg="found.cfg"):
    return amct.create_prune_retrain_model(model, data()[0][:1], cfg, "record.txt")


def complexity(model) -> int:
    """Multiply-accumulates of all convolutions and linear layers on one image, counted apart."""
    total = 0

    def count(module, _, output):
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):
            positions = output[0, 0].numel() // (module.stride[0] * module.stride[1])
            total += positions * module.weight.numel()
        else:
            total += output[0].numel() // module.weight.shape[0] * module.weight.numel()

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(data()[0][:1])
    for handle in handles:
        handle.remove()
    return total


def widths(model) -> dict[str, int]:
    """Output channels of each layer."""
    found = {}
    for name, module in model.named_modules():
        channels = getattr(module, "out_channels", getattr(module, "out_features", None))
        if channels is not None:
            found[name] = channels
    return found
