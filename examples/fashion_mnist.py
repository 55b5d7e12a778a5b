"""Fashion-MNIST and a small residual network trained on it: the example that can be trained here.

The images are in the Debian package ``dataset-fashion-mnist``; where it is not installed, the
environment variable FASHION_MNIST_DIR names a folder with its four ``*-ubyte.gz`` files::

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDERS = (
    os.environ.get("FASHION_MNIST_DIR", ""),
    "/usr/share/datasets/fashion-mnist",
)
OUTPUTS = Path("outputs") / "fashion_mnist"


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two blocks and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(block(channels, channels), block(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x plus what the blocks make of it."""
        return x + self.inner(x)


def resnet(width: int = 32) -> nn.Sequential:
    """A small residual network for 28 x 28 grey images: [N, 1, 28, 28] -> [N, 10]."""
    return nn.Sequential(
        block(1, width),
        block(width, 2 * width, 2),
        Residual(2 * width),
        block(2 * width, 4 * width, 2),
        Residual(4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def folder() -> Path:
    """Where the four files are.

    Raises:
        FileNotFoundError: in none of the known places.
    """
    for name in filter(None, FOLDERS):
        found = next(Path(name).rglob("train-images-idx3-ubyte.gz"), None)
        if found is not None:
            return found.parent
    raise FileNotFoundError(
        "Fashion-MNIST is not here: install the Debian package dataset-fashion-mnist, or let "
        "FASHION_MNIST_DIR name the folder with its four files "
        "(train-images-idx3-ubyte.gz, …)"
    )


def load(part: str) -> tuple[Tensor, Tensor]:
    """Normalised images float32 [N, 1, 28, 28] and labels int64 [N] of ``train`` or ``t10k``."""
    place = folder()
    with gzip.open(place / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    with gzip.open(place / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    scaled = (torch.from_numpy(images.copy()).float() / 255 - 0.286) / 0.353
    return scaled, torch.from_numpy(labels.astype(np.int64))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    rate: float,
    epochs: int = 1,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    seed: int = 0,
) -> None:
    """SGD in batches of 128 with a one-cycle rate whose peak is ``rate``; half are mirrored."""
    steps = len(images) // 128
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps * epochs)
    chance = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=chance)
        for step in range(steps):
            chosen = order[step * 128 : (step + 1) * 128]
            batch = images[chosen]
            if torch.rand((), generator=chance) < 0.5:
                batch = batch.flip(3)
            optimizer.zero_grad()
            loss(model(batch), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Percent of images whose label is found, 500 at a time; a module is put into eval mode."""
    if isinstance(model, nn.Module):
        model.eval()
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * float((found == labels).float().mean())


def trained(width: int = 32, epochs: int = 3, images: int = 60000) -> nn.Sequential:
    """The network in eval mode, trained once (about 100 s) and then read from ``outputs``."""
    file = OUTPUTS / f"float_w{width}_e{epochs}_n{images}.pt"
    torch.manual_seed(0)
    model = resnet(width)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        pictures, labels = (part[:images] for part in load("train"))
        train(model, pictures, labels, 0.1, epochs)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model.eval()
