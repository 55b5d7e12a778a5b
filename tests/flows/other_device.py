"""A pretended device: tensors that live there meet tensors of the CPU only by an explicit copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# A device that every build of torch can name. Its own tensors have no values; none is made here.
DEVICE = torch.device("meta")
# Operators that copy from one device to another.
COPYING = ("aten::copy_", "aten::_to_copy")


class There(Tensor):
    """A tensor on the pretended device; its values are held by one on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"There({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = There(self.held.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run_there(func, args, kwargs or {})


def run_there(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator on the CPU tensors behind, refused where devices are mixed."""
    operands = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in operands if isinstance(value, There)]
    name = func._schema.name
    strangers = [v for v in operands if not isinstance(v, There) and v.dim() > 0]
    if there and strangers and name not in COPYING:
        raise RuntimeError(f"{name}: tensors on {DEVICE} and cpu")
    if any(value.dtype == torch.float64 for value in there):
        raise RuntimeError(f"{name}: {DEVICE} has no float64")
    target = kwargs.get("device")
    plain_args, plain = tree_map(lambda v: v.held if isinstance(v, There) else v, (args, kwargs))
    if target is not None:
        plain["device"] = "cpu"
    stays = bool(there) if target is None else torch.device(target) == DEVICE
    result = func(*plain_args, **plain)
    if name == "aten::copy_" or (name.endswith("_") and not name.endswith("__")):
        return args[0]
    if not stays:
        return result
    return tree_map(lambda v: There(v) if isinstance(v, Tensor) else v, result)


class WithDevice(TorchDispatchMode):
    """While active, tensors can be made on the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_there(func, args, kwargs or {})


def moved(model: nn.Module) -> nn.Module:
    """`model` with its parameters and buffers on the device, in place."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(There(parameter.detach()), False)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = There(buffer.detach())
    return model
