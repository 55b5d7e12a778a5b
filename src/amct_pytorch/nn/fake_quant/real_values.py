"""The real values of a module's tensors while torch.export runs it on fake ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")


class RealValues(nn.Module):
    """A module that knows its own parameters and buffers at any time.

    torch.export puts fake tensors, without values, in their place while it runs `forward`.
    The factors of a quantizer have to be constants of the exported file all the same.
    """

    _real: dict[str, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "_real", {})
        super().__init__(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module."""
        super().register_parameter(name, param)
        self._note()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in every module."""
        super().register_buffer(name, tensor, persistent)
        self._note()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._note()
        return result

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._note()

    def _note(self) -> None:
        self._real.clear()
        self._real.update({k: v for k, v in self._parameters.items() if v is not None})
        self._real.update({k: v for k, v in self._buffers.items() if v is not None})

    def real(self, name: str) -> Tensor:
        """The parameter or buffer of this name with its values, detached."""
        if torch.onnx.is_in_onnx_export() and name in self._parameters | self._buffers:
            return with_real_values(self._real[name].detach)
        tensor: Tensor = getattr(self, name)
        return tensor.detach()


def with_real_values(function: Callable[[], T]) -> T:
    """What `function` computes from real tensors, outside any tracing that is going on."""
    with _disable_current_modes(), torch.no_grad():
        return function()
