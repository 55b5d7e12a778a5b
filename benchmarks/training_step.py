"""One training step, as the benchmarks of training time it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that makes one step of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step
