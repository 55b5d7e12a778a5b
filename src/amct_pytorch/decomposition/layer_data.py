"""What the model's own data says about its layers: inputs to weigh errors by, outputs to meet.

The error of a weight says little about that of an output: inputs behind a ReLU have a large mean
and are strongly correlated. The first piece is therefore found in the metric of its own inputs
(X. Zhang, J. Zou, K. He, J. Sun: Accelerating very deep convolutional networks, TPAMI 2016,
section 3.1, minimise the error of responses in the same way), and the last piece, with its bias,
is the least-squares solution for the layer's own outputs given what the first piece lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.decomposition.geometry import Geometry
from amct_pytorch.decomposition.modules import build_pieces
from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, ModelError
from amct_pytorch.graph.tensors import ModelInputs, in_float64, in_own_precision, random_state_kept

# Positions of one image that are looked at; neighbours say nearly the same.
POSITIONS = 4096
# Ridge, as a share of the mean energy of an input: directions that the data hardly has stay as
# the weight alone would have them.
DAMPING = 1e-3


def batches_of(calibration_data: Any) -> list[ModelInputs]:
    """The user's batches as arguments of the model.

    Raises:
        ArgumentTypeError: it is no iterable of batches.
        ArgumentValueError: it has none.
    """
    if isinstance(calibration_data, (Tensor, Mapping, str)) or not isinstance(
        calibration_data, Iterable
    ):
        raise ArgumentTypeError(
            f"calibration_data is a {type(calibration_data).__name__}; allowed is a list (or "
            "another iterable) of batches, each as input_data"
        )
    batches = []
    for number, batch in enumerate(calibration_data):
        try:
            batches.append(ModelInputs.of(batch))
        except ArgumentTypeError as error:
            text = str(error).removeprefix("input_data ")
            raise ArgumentTypeError(f"calibration_data[{number}] {text}") from None
    if not batches:
        raise ArgumentValueError("calibration_data holds no batch; allowed is one or more")
    return batches


@dataclass
class Metric:
    """What a layer's inputs weigh an error with, for each kernel axis that may come first.

    Attributes:
        sums: by axis, [C k, C k] float64 on the CPU, sum of x x^T over patches x of the
            first piece.
        count: by axis, number of patches.
    """

    sums: dict[int, Tensor]
    count: dict[int, int]

    def root(self, axis: int) -> Tensor:
        """Lower triangular L with L L^T the damped mean of x x^T."""
        mean = self.sums[axis] / max(self.count[axis], 1)
        ridge = DAMPING * mean.diagonal().mean()
        lower: Tensor = torch.linalg.cholesky(mean + ridge * torch.eye(len(mean)).to(mean))
        return lower


def input_metrics(
    model: nn.Module, batches: list[ModelInputs], layers: Mapping[str, nn.Conv2d]
) -> dict[str, Metric]:
    """Runs the model on all batches and gathers how the inputs of `layers` are correlated.

    Args:
        model: a copy in eval mode.
        batches: from `batches_of`.
        layers: Conv2d by name.

    Returns:
        By name; a layer whose inputs hold NaN or infinity has none.
    """
    metrics = {name: Metric({0: _zero(), 1: _zero()}, {0: 0, 1: 0}) for name in layers}
    # Pieces of rank 1 with any weight: only their geometry is used.
    firsts = {name: [_first(conv, axis) for axis in (0, 1)] for name, conv in layers.items()}

    def see(name: str, x: Tensor, _: Tensor) -> None:
        metric = metrics[name]
        for axis, piece in enumerate(firsts[name]):
            for rows, _kept in _patches(x, piece):
                metric.sums[axis] = metric.sums[axis] + in_float64(rows.T @ rows)
                metric.count[axis] += len(rows)

    _run(model, batches, list(layers), see)
    return {
        name: metric
        for name, metric in metrics.items()
        if all(metric.count[a] and bool(torch.isfinite(metric.sums[a]).all()) for a in (0, 1))
    }


@dataclass
class Fit:
    """The last piece of a row, fitted to the outputs of the layer it replaces.

    Attributes:
        error_before: relative error of the row's output on the data, with the bias as it was.
        error: the same after fitting.
    """

    error_before: float
    error: float


class _Moments:
    """Sums that a least-squares problem needs: inputs z (with a 1 for the bias), outputs y."""

    def __init__(self) -> None:
        self.zz, self.zy, self.yy, self.count = _zero(), _zero(), 0.0, 0

    def add(self, z: Tensor, y: Tensor) -> None:
        self.zz = self.zz + in_float64(z.T @ z)
        self.zy = self.zy + in_float64(z.T @ y)
        self.yy += float((y**2).sum())
        self.count += len(z)

    def error(self, solution: Tensor) -> float:
        """Relative error of z @ solution."""
        cross = float((solution * self.zy).sum())
        own = float((solution * (self.zz @ solution)).sum())
        return (max(self.yy - 2 * cross + own, 0.0) / self.yy) ** 0.5 if self.yy else 0.0


def fit_outputs(
    model: nn.Module, batches: list[ModelInputs], rows: Mapping[str, nn.Sequential]
) -> dict[str, Fit]:
    """Fits the last piece of each row, in place, to the outputs of the layer of that name.

    Args:
        model: a copy in eval mode, with the layers as they were.
        batches: from `batches_of`.
        rows: pieces by the name of the layer that they will replace.

    Returns:
        By name; a row whose outputs cannot be fitted (NaN in them, or a solution that
        overflows its dtype) stays as it is and has none.
    """
    moments = {name: _Moments() for name in rows}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        *before, last = rows[name]
        assert isinstance(last, nn.Conv2d)
        for piece in before:
            x = piece.forward(x)
        targets = y[None] if y.dim() == 3 else y
        for number, (z, kept) in enumerate(_patches(x, last)):
            if last.bias is not None:
                z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
            target = targets[number].flatten(1).T.float()
            moments[name].add(z, target if kept is None else target[kept])

    _run(model, batches, list(rows), see)
    fits = {name: _fit(rows[name][-1], moments[name]) for name in rows}
    return {name: fit for name, fit in fits.items() if fit is not None}


def _fit(last: nn.Module, moments: _Moments) -> Fit | None:
    assert isinstance(last, nn.Conv2d)
    finite = moments.count and bool(torch.isfinite(moments.zz).all() & moments.zy.isfinite().all())
    if not finite or moments.yy == 0.0:
        return None
    with torch.no_grad():
        now = in_float64(last.weight).flatten(1).T
        if last.bias is not None:
            now = torch.cat([now, in_float64(last.bias)[None]])
        ridge = DAMPING * moments.zz.diagonal().mean()
        damped = moments.zz + ridge * torch.eye(len(now)).to(now)
        solution, bad = torch.linalg.solve_ex(damped, moments.zy + ridge * now)
        before, after = moments.error(now), moments.error(solution)
        if int(bad) or not after <= before:
            return Fit(before, before)
        if not bool(torch.isfinite(solution.to(last.weight.dtype)).all()):
            return None
        weight = solution if last.bias is None else solution[:-1]
        last.weight.copy_(weight.T.reshape(last.weight.shape))
        if last.bias is not None:
            last.bias.copy_(solution[-1])
    return Fit(before, after)


def _first(conv: nn.Conv2d, axis: int) -> nn.Conv2d:
    split = Geometry.of(conv).spatial(axis, 1)
    piece = build_pieces(conv, split, [torch.zeros(shape) for shape in split])[0]
    assert isinstance(piece, nn.Conv2d)
    return piece


def _patches(x: Tensor, piece: nn.Conv2d) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What `piece` sees at its output positions, one image at a time.

    Yields:
        [positions, C kh kw] float32, and which positions these are (None: all).
    """
    x = x[None] if x.dim() == 3 else x
    mode = "constant" if piece.padding_mode == "zeros" else piece.padding_mode
    chance = torch.Generator().manual_seed(0)
    for image in x.detach().float().split(1):
        padded = nn.functional.pad(image, piece._reversed_padding_repeated_twice, mode=mode)
        columns = nn.functional.unfold(padded, piece.kernel_size, stride=piece.stride)[0]
        kept = None
        if columns.shape[1] > POSITIONS:
            kept = torch.randperm(columns.shape[1], generator=chance)[:POSITIONS].to(x.device)
            columns = columns[:, kept]
        yield columns.T, kept


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def _run(
    model: nn.Module,
    batches: list[ModelInputs],
    names: list[str],
    see: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Calls `see` with the input and output of the named layers, batch by batch.

    Raises:
        ModelError: the model does not run on a batch.
    """
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(model))
        stack.enter_context(in_own_precision(model))
        for name in names:
            stack.enter_context(_watched(model.get_submodule(name), name, see))
        for number, batch in enumerate(batches):
            try:
                batch.copied().call(model)
            except Exception as error:
                raise ModelError(
                    f"the model cannot be run on calibration_data[{number}] ({batch}): "
                    f"{type(error).__name__}: {error}"
                ) from error


@contextmanager
def _watched(
    module: nn.Module, name: str, see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        see(name, args[0] if args else kwargs["input"], output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
