"""Small networks to distill, and the way from a network to its distilled student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import amct_pytorch as amct

FOUR_BITS = """
distill_weight_quant_config { arq_distill { dst_type: INT4 channel_wise: true } }
"""


class Mixed(nn.Module):
    """A stem, a residual, a transposed convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.second(F.leaky_relu(self.norm(self.first(x)), 0.1)))
        return self.head(torch.sigmoid(self.up(x)).mean((2, 3)))


def mixed() -> Mixed:
    """With BatchNorms that do something."""
    torch.manual_seed(0)
    model = Mixed()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def images(number: int = 4, seed: int = 1) -> list[Tensor]:
    """Batches float32 [16, 2, 6, 6], smooth: for white noise no rounding beats the nearest."""
    chance = torch.Generator().manual_seed(seed)
    coarse = [torch.randn(16, 2, 2, 2, generator=chance) for _ in range(number)]
    return [F.interpolate(x, (6, 6), mode="bilinear") for x in coarse]


def student_of(
    model: nn.Module, folder: Path, cfg: str = FOUR_BITS, inputs: Any = None
) -> tuple[nn.Module, Path]:
    """The student that a .cfg asks for, and its config file."""
    inputs = images()[0] if inputs is None else inputs
    definition, config = folder / "distill.cfg", folder / "distill.json"
    definition.write_text(cfg)
    amct.create_distill_config(config, model, inputs, definition)
    return amct.create_distill_model(config, model, inputs), config
