"""Tensors inside the nested values that models take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amct_pytorch.errors import ArgumentTypeError


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, in order, through lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for spec in dataclasses.fields(value):
            yield from tensors_in(getattr(value, spec.name))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to each tensor in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{where}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_described, value))})"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "an object"


@dataclass(frozen=True)
class ModelInputs:
    """Positional and keyword arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, input_data: Any) -> ModelInputs:
        """The arguments that a user's `input_data` stands for.

        Args:
            input_data: a tuple or list of tensors, a bare tensor (a tuple of one), or a
                dict of keyword inputs.

        Raises:
            ArgumentTypeError: it is something else, or holds no tensor.
        """
        if isinstance(input_data, Tensor):
            inputs = cls((input_data,))
        elif isinstance(input_data, Mapping):
            inputs = cls((), dict(input_data))
        elif isinstance(input_data, (tuple, list)):
            inputs = cls(tuple(input_data))
        else:
            raise ArgumentTypeError(
                f"input_data is a {type(input_data).__name__}; allowed are a tuple or list of "
                "tensors, one tensor, or a dict of keyword inputs"
            )
        if next(tensors_in((inputs.args, inputs.kwargs)), None) is None:
            raise ArgumentTypeError("input_data holds no tensor")
        return inputs

    def copied(self) -> ModelInputs:
        """The same arguments with every tensor cloned and detached."""
        args, kwargs = map_tensors((self.args, self.kwargs), lambda t: t.detach().clone())
        return ModelInputs(args, kwargs)

    def __str__(self) -> str:
        """Types and shapes: ``float32 [4, 3, 16, 16], mask: bool [4, 16]``."""
        named = {f"{name}: ": value for name, value in self.kwargs.items()}
        values = [("", value) for value in self.args] + list(named.items())
        return ", ".join(f"{name}{_described(value)}" for name, value in values) or "nothing"

    def call(self, model: torch.nn.Module) -> Any:
        """`model` run on these arguments."""
        return model(*self.args, **self.kwargs)


def in_float64(x: Tensor) -> Tensor:
    """`x` in float64 on the CPU: not every device has float64, and none needs it for long."""
    return x.detach().cpu().double()


@contextmanager
def without_autocast(*devices: str) -> Iterator[None]:
    """Without autocast on the CPU and on the named types of devices."""
    with ExitStack() as stack:
        for device in sorted({*devices, "cpu"}):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def result_dtype(x: Tensor) -> torch.dtype:
    """The type of a convolution's or matrix product's result for this input."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


@contextmanager
def in_own_precision(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients and without the caller's autocast: the model in its own dtypes."""
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    with without_autocast(*devices), torch.no_grad():
        yield


@contextmanager
def random_state_kept(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards the global random state of the CPU and of the model's devices is as before."""
    devices: dict[str, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # Such devices have a module of their own, torch.cuda say; that of mps takes no index.
        kind = tensor.device.type
        if kind != "mps" and hasattr(getattr(torch, kind, None), "get_rng_state"):
            devices.setdefault(kind, set()).add(tensor.device.index or 0)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(sorted(indices), device_type=kind))
        yield
