"""Blocks: parts of a traced run that one tensor enters and one tensor leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amct_pytorch.errors import ModelError
from amct_pytorch.graph.trace import OpCall, Trace
from amct_pytorch.graph.units import Units


@dataclass(frozen=True)
class Block:
    """A part of a run.

    Attributes:
        layers: those in it, in the order in which they ran.
        ops: its calls, in order; others may have run between them. Those that do not depend on
            the model's input (a weight that is computed) may stand before all others.
        begin: index of the first call that does.
        entry: the value that enters it.
        result: the value that leaves it.
    """

    layers: tuple[str, ...]
    ops: tuple[OpCall, ...]
    begin: int
    entry: int
    result: int


def find_block(
    trace: Trace, calls: Mapping[str, OpCall], start: str, end: str | None = None
) -> Block:
    """The block from the unit of layer `start` to that of `end`, both included.

    Args:
        trace: the run.
        calls: the one call of each layer, by name.
        start: the first layer.
        end: the last layer; None: `start`.

    Raises:
        ModelError: no path leads from `start` to `end`, or more than one tensor that depends on
            the model's input goes in or comes out.
    """
    end = start if end is None else end
    result = Units(trace, calls).end(end)
    ops = _between(trace, start, result)
    layers = tuple(name for name, call in calls.items() if any(op is call for op in ops))
    place = f"block {start!r}" if start == end else f"block {start!r} to {end!r}"
    if not {start, end} <= set(layers):
        raise ModelError(f"{place}: {end!r} does not run on what {start!r} makes")
    made = {value for op in ops for value in op.outputs}
    read = dict.fromkeys(value for op in ops for value in op.inputs)
    entries = [v for v in read if v in trace.from_input and v not in made]
    if len(entries) != 1:
        raise ModelError(f"{place}: {len(entries)} tensors go into it; allowed is one")
    inside = {op.index for op in ops}
    made &= trace.from_input
    left = {v for op in trace.ops if op.index not in inside for v in op.inputs if v in made}
    left |= made & set(trace.outputs)
    if not left <= {result}:
        raise ModelError(
            f"{place}: {len(left | {result})} tensors of it are used outside; allowed is one, "
            "the output of its last layer with BatchNorm and activation"
        )
    begin = next(op.index for op in ops if _moves(trace, op))
    return Block(layers, tuple(ops), begin, entries[0], result)


def only_call(call: OpCall, layers: tuple[str, ...]) -> Block:
    """The block that is nothing but one layer's call."""
    return Block(layers, (call,), call.index, call.inputs[0], call.outputs[0])


def _between(trace: Trace, start: str, result: int) -> list[OpCall]:
    """The calls that depend on those in the scope of `start` and that `result` depends on.

    Also those that it depends on and that do not depend on the model's input.
    """
    inside: set[int] = set()
    reached: set[int] = set()
    for op in trace.ops:
        if start in op.scopes or not reached.isdisjoint(op.inputs) or not _moves(trace, op):
            inside.add(op.index)
            reached.update(value for value in op.outputs if value in trace.from_input)
    needed = {result}
    chosen: list[OpCall] = []
    for op in reversed(trace.ops):
        if op.index in inside and not needed.isdisjoint(op.outputs):
            chosen.append(op)
            needed.update(op.inputs)
    return chosen[::-1]


def _moves(trace: Trace, op: OpCall) -> bool:
    """Whether what a call makes depends on the model's input."""
    return any(value in trace.from_input for value in op.outputs)


def cut(chain: Sequence[str], size: int) -> list[list[str]]:
    """A chain in pieces of `size` layers; the last may have fewer."""
    return [list(chain[i : i + size]) for i in range(0, len(chain), size)]
