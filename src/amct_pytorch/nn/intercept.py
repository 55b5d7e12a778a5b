"""Catching the one convolution or linear call that a layer's own forward makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions of layers without weights: their arguments behind the data are settings.
UNWEIGHTED = frozenset({"avg_pool2d"})


@dataclass(frozen=True)
class LayerCall:
    """One call of conv2d, linear, avg_pool2d, … with its operands told apart.

    Attributes:
        function: the torch function.
        x: the data operand, as the layer's own forward made it (padded, say).
        weight: the weight operand, which need not be the layer's parameter; None if the
            function takes none.
        bias: the bias operand or None.
        args: positional arguments behind the operands.
        kwargs: keyword arguments other than the operands.
    """

    function: Callable[..., Tensor]
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def bind(
        cls, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LayerCall:
        """Tells the operands of ``function(input, weight, bias, ...)`` apart."""
        rest = dict(kwargs)
        unweighted = getattr(function, "__name__", "") in UNWEIGHTED
        names = ("input",) if unweighted else ("input", "weight", "bias")
        operands = [
            args[i] if i < len(args) else rest.pop(name, None) for i, name in enumerate(names)
        ]
        x, weight, bias = operands if len(operands) > 1 else (operands[0], None, None)
        return cls(function, x, weight, bias, tuple(args[len(names) :]), rest)

    def without_operands(self) -> LayerCall:
        """The call with empty tensors for its operands: enough to `run` it on others."""
        weight = None if self.weight is None else self.weight.new_empty(0)
        return replace(self, x=self.x.new_empty(0), weight=weight, bias=None)

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same call on other operands; without weights, on another input."""
        operands = (x,) if self.weight is None else (x, weight, bias)
        return self.function(*operands, *self.args, **self.kwargs)


class CallInterceptor(TorchFunctionMode):
    """While active, answers calls of the named torch functions itself.

    Args:
        functions: names of the functions, e.g. ``("conv2d",)``.
        answer: called in their place; what it returns is the call's result.
    """

    def __init__(self, functions: tuple[str, ...], answer: Callable[[LayerCall], Tensor]) -> None:
        super().__init__()
        self._functions = functions
        self._answer = answer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answers `func` if it is one of the named functions, else runs it."""
        if getattr(func, "__name__", "") in self._functions:
            return self._answer(LayerCall.bind(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
