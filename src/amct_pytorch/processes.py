"""Several processes that work on one thing (torch.distributed), whatever backend they use."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def rank() -> int:
    """The number of this process; 0 where there is only one."""
    return dist.get_rank() if _many() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _many() else 1


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


def gathered(value: T) -> list[T]:
    """The value of every process, in the order of their ranks; all processes call this.

    Tensors arrive on the CPU, in one's own value too: what is merged has to be in one place.
    """
    if world_size() == 1:
        return [value]
    packed: list[Any] = [None] * world_size()
    dist.all_gather_object(packed, _packed(value))
    return [pickle.loads(data) for data in packed]


def in_one_process(function: Callable[[], T], which: int) -> T:
    """What a function returns in one of the processes; all processes call this.

    Tensors arrive on the CPU, except in the process that runs the function.

    Raises:
        Whatever the function raises, in all processes.
    """
    if world_size() == 1:
        return function()
    value: Any = None
    error: Exception | None = None
    if rank() == which:
        try:
            value = function()
        except Exception as raised:
            error = raised
    box: list[Any] = [_packed_result(value, error) if rank() == which else None]
    dist.broadcast_object_list(box, src=which)
    if rank() != which:
        value, error = pickle.loads(box[0])
    if error is not None:
        raise error
    result: T = value
    return result


def _packed_result(value: Any, error: Exception | None) -> bytes:
    """Both, pickled; an error that does not come out again is told in another one's words."""
    if error is not None:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # The others wait for an answer, whatever it is.
            error = RuntimeError(f"{type(error).__name__}: {error}")
    return _packed((value, error))


def _packed(value: Any) -> bytes:
    """Pickled, tensors as if they were on the CPU: another process may lack this one's device."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.dispatch_table = copyreg.dispatch_table.copy()
    pickler.dispatch_table[Tensor] = _reduced
    pickler.dispatch_table[torch.nn.Parameter] = _reduced
    pickler.dump(value)
    return buffer.getvalue()


def _reduced(tensor: Tensor) -> Any:
    return tensor.detach().cpu().clone().__reduce_ex__(2)
