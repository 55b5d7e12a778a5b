"""A network of ResNet-50's shape, for figures of time and memory that need no trained weights.

The bottleneck form with the stride in its 3 x 3 convolution (He et al., "Deep Residual Learning
for Image Recognition", 2015, table 1): 53 convolutions, 53 BatchNorms, one Linear, 25.6 million
parameters, 4.1 GMACs at 224 x 224.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Blocks, and channels of their 3 x 3 convolution, in each of the four stages.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
EXPANSION = 4


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around which the input is added."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, 4 * channels, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += shortcut
        result: Tensor = self.relu(y)
        return result


class ResNet50(nn.Module):
    """Images [N, 3, 224, 224] to logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        stages = []
        for number, (blocks, channels) in enumerate(STAGES):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if number > 0 and block == 0 else 1
                stage.append(Bottleneck(in_channels, channels, stride))
                in_channels = EXPANSION * channels
            stages.append(stage)
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y = self.avgpool(self.layers(y))
        result: Tensor = self.fc(torch.flatten(y, 1))
        return result


def resnet50(seed: int = 0) -> ResNet50:
    """The network with random weights and BatchNorms like those of a trained one, in eval mode.

    Convolutions are drawn as for training; the BatchNorms' gains and shifts are drawn around 1
    and 0 (around 0.3 where a block ends, as trained ones are smaller there), and their statistics
    are those of two random images, so that every activation has the scale that training gives it.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = ResNet50()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                gain = 0.3 if name.endswith("bn3") else 1.0
                nn.init.uniform_(module.weight, 0.5 * gain, 1.5 * gain)
                nn.init.normal_(module.bias, 0, 0.2)
                module.momentum = None  # the plain mean of what is seen
        model.train()
        with torch.no_grad():
            model(images(2))
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def images(number: int, seed: int = 1) -> Tensor:
    """Random images [number, 3, 224, 224], smooth like photos, mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(number, 3, 224, 224)
    for size in (7, 28, 112):
        noise = torch.randn(number, 3, size, size, generator=generator)
        total += nn.functional.interpolate(noise, size=(224, 224), mode="bilinear") / size**0.5
    return (total - total.mean()) / total.std()
