"""Doing a traced run again, call by call, from its middle, or only a part of it.

A part of a network can be run by itself without taking the network apart: its calls are in the
trace, whatever Python made them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from amct_pytorch.graph.tensors import ModelInputs, tensors_in
from amct_pytorch.graph.trace import OpCall, Operand, Trace

# Runs a call in its own way: given the function, its arguments and keyword arguments.
Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Replay:
    """One traced run, as far as it has been done again.

    Python between the calls is not run again: numbers and branches that it took from tensors
    stay those of the trace.

    Args:
        trace: the run.
        inputs: arguments of the run to do, in the shapes of the traced ones.
        tensors: parameters and buffers by name, which may be another model's.
        answers: calls to run in another way, by their index.
        keep: values to copy as they are made, before a later call can change them in place;
            `take` fetches them.

    Attributes:
        position: index of the next call.
    """

    def __init__(
        self,
        trace: Trace,
        inputs: ModelInputs,
        tensors: Mapping[str, Tensor],
        answers: Mapping[int, Answer] = MappingProxyType({}),
        keep: Iterable[int] = (),
    ) -> None:
        self._trace, self._tensors, self._answers = trace, tensors, answers
        devices = {tensor.device for tensor in tensors.values()}
        self._device = (
            devices.pop() if len(devices) == 1 and "cpu" not in map(str, devices) else None
        )
        self.position = 0
        given = tensors_in((inputs.args, inputs.kwargs))
        self._values: dict[int, Tensor] = dict(zip(trace.inputs, given, strict=True))
        self._values.update(trace.constants)
        self._last_use = {value: op.index for op in trace.ops for value in op.inputs}
        self._kept = frozenset(trace.outputs)
        self._wanted = frozenset(keep)
        self._copies: dict[int, Tensor] = {}

    def advance(self, position: int) -> None:
        """Does every call before `position` that has not been done."""
        for op in self._trace.ops[self.position : position]:
            self._do(op, self._values)
            for value in self._wanted.intersection(op.outputs):
                self._copies[value] = self._values[value].clone()
            for value in {*op.inputs, *op.outputs}:
                if self._last_use.get(value, -1) <= op.index and value not in self._kept:
                    self._values.pop(value, None)
        self.position = max(self.position, position)

    def value(self, value: int) -> Tensor:
        """A value that has been made and is still needed."""
        return self._values[value]

    def take(self, value: int) -> Tensor:
        """A value of `keep` as it was made, once."""
        return self._copies.pop(value)

    def run_part(self, ops: Collection[OpCall], given: Mapping[int, Tensor], result: int) -> Tensor:
        """Does some calls and nothing else; the run as far as it is done stays as it is.

        Args:
            ops: in order.
            given: tensors for some of the values they read; others come from the run.
            result: the value to return, one that they make.
        """
        values = {
            value: self._values[value] for op in ops for value in op.inputs if value in self._values
        }
        values.update(given)
        for op in ops:
            self._do(op, values)
        return values[result]

    def held_bytes(self) -> int:
        """Bytes of the values that are held now; those that share memory count once each."""
        held = {id(tensor): tensor for tensor in self._moving().values()}
        held.update((id(tensor), tensor) for tensor in self._copies.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def replace_held(self, move: Callable[[Tensor], Tensor]) -> None:
        """Puts what `move` makes of them in place of the values that are held now."""
        moved: dict[int, Tensor] = {}
        for value, tensor in self._moving().items():
            if id(tensor) not in moved:
                moved[id(tensor)] = move(tensor)
            self._values[value] = moved[id(tensor)]
        self._copies = {value: move(tensor) for value, tensor in self._copies.items()}

    def _moving(self) -> dict[int, Tensor]:
        return {v: t for v, t in self._values.items() if v not in self._trace.constants}

    def _do(self, op: OpCall, values: dict[int, Tensor]) -> None:
        def filled(argument: Any) -> Any:
            if isinstance(argument, Operand):
                if argument.parameter is not None:
                    return self._tensors[argument.parameter]
                tensor = values[argument.value]
                # It may have been put aside on the CPU.
                return tensor if self._device is None else tensor.to(self._device)
            if isinstance(argument, (list, tuple)):
                return type(argument)(filled(item) for item in argument)
            return argument

        args = tuple(filled(argument) for argument in op.args)
        kwargs = {name: filled(argument) for name, argument in op.kwargs.items()}
        answer = self._answers.get(op.index)
        assert op.target is not None
        result = op.target(*args, **kwargs) if answer is None else answer(op.target, args, kwargs)
        made = list(tensors_in(result))
        if op.function == "__setitem__":
            made.append(args[0])
        values.update(zip(op.outputs, made, strict=True))
