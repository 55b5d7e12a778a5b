"""Training one block of the student to make what the teacher's block makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from amct_pytorch.distillation.runs import Part, Run
from amct_pytorch.errors import CalibrationError

Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Outcome:
    """How a block's distillation went.

    Attributes:
        before: mean loss over the batches as the quantized block began.
        after: the same with the parameters that are kept.
        best_epoch: the epoch they are from; 0: those that the block began with.
    """

    before: float
    after: float
    best_epoch: int


def observe(runs: Sequence[Run], part: Part, batch_num: int) -> None:
    """Shows the part its first batches, from which its ranges come.

    Args:
        runs: which have all reached the part; its layers are in training mode.
        part: the block.
        batch_num: of the config.

    Raises:
        CalibrationError: there are fewer batches.
    """
    if len(runs) < batch_num:
        raise CalibrationError(
            f"train_loader yields {len(runs)} batches, and the config's batch_num is {batch_num}; "
            "give at least as many"
        )
    with torch.no_grad():
        for run in runs[:batch_num]:
            run.student_output(part, copied=True)


def train_block(
    runs: Sequence[Run],
    part: Part,
    targets: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    make_optimizer: MakeOptimizer,
    loss: Loss,
    epochs: int,
    tell: Callable[[float], None],
    *,
    decay: bool,
) -> Outcome:
    """Trains a block; afterwards it has the parameters with the least mean loss.

    Args:
        runs: which have all reached the part.
        part: the block.
        targets: the teacher's output for each run.
        parameters: what is trained.
        make_optimizer: of the block's parameters.
        loss: of the student's output and the teacher's.
        epochs: passes over the runs.
        tell: called with each batch's loss.
        decay: whether the learning rate falls to 0, in equal steps, so that weights come to rest
            on one side of a rounding boundary.

    Raises:
        CalibrationError: the loss is no finite number.
    """
    copied = runs[0].changes_input(part)

    def mean_loss() -> float:
        with torch.no_grad():
            losses = [
                loss(run.student_output(part, copied=copied), target)
                for run, target in zip(runs, targets, strict=True)
            ]
        return _finite(float(torch.stack(losses).double().mean()), part)

    before = best = mean_loss()
    if not parameters or not epochs:
        return Outcome(before, before, 0)
    kept, best_epoch = [p.detach().clone() for p in parameters], 0
    optimizer = make_optimizer(parameters)
    steps = epochs * len(runs)
    fall = LinearLR(optimizer, 1.0, 0.0, steps) if decay else None
    for epoch in range(1, epochs + 1):
        with torch.enable_grad():
            for run, target in zip(runs, targets, strict=True):
                optimizer.zero_grad(set_to_none=True)
                value = loss(run.student_output(part, copied=copied), target)
                value.backward()
                optimizer.step()
                if fall is not None:
                    fall.step()
                tell(float(value.detach()))
        now = mean_loss()
        if now < best:
            best, best_epoch = now, epoch
            kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return Outcome(before, best, best_epoch)


def _finite(value: float, part: Part) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise CalibrationError(
            f"the loss of block {part.layers[0]!r} to {part.layers[-1]!r} is {value}; a lower lr, "
            "or inputs without NaN and infinity, are needed"
        )
    return value


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters, whatever the model's owner has set."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)
