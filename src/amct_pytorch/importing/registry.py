"""The table of ONNX operators that can be read, and how an operator is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from amct_pytorch.importing.values import Value


@dataclass(frozen=True)
class Operator:
    """One node, without its tensors.

    Attributes:
        op_type: of ONNX's default domain.
        name: of the node.
        attributes: their values, strings decoded.
        opset: the version that the model uses.
        outputs: how many outputs the node has.
    """

    op_type: str
    name: str
    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return self.attributes.get(name, default)


# Called with the operator and its inputs (None for one that is left out); returns the output,
# or a tuple of the outputs.
Function = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """How one operator is computed.

    Attributes:
        on_tensors: from tensors; those of `host_inputs` as host values.
        on_host: from host values alone; None: such are made tensors first.
        host_inputs: positions whose values must be known as numbers: sizes, axes.
    """

    on_tensors: Function
    on_host: Function | None = None
    host_inputs: frozenset[int] = frozenset()


OPERATORS: dict[str, Entry] = {}


def operator(
    *op_types: str, host_inputs: tuple[int, ...] = (), on_host: Function | None = None
) -> Callable[[Function], Function]:
    """Registers a function for operators; see `Entry`.

    Raises:
        ValueError: one is there already.
    """

    def register(function: Function) -> Function:
        for op_type in op_types:
            if op_type in OPERATORS:
                raise ValueError(f"operator {op_type} is there already")
            OPERATORS[op_type] = Entry(function, on_host, frozenset(host_inputs))
        return function

    return register


__all__ = ["OPERATORS", "Entry", "Function", "Operator", "Value", "operator"]
