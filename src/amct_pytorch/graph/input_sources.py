"""Where the input of a layer comes from, and whether its channels can be scaled there.

A factor for each input channel of a layer can be moved into what has made the input, if that has
a parameter for each channel and if nothing else reads the result. From the layer's input one goes
back over calls that keep channels apart and pass factors on, f(s x) = s f(x) for s > 0, to the
layer or the norm they come from. Which channel ends up where, through heads, transpositions
and repeated key-value heads, is found by sending the channels' numbers the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amct_pytorch.graph.trace import ONE_CALL, OpCall, Operand, Trace

# By the name of the torch function; those that work in place have the same name and "_".
PASSING = frozenset(
    (
        "relu",
        "leaky_relu",
        "prelu",
        "dropout",
        "to",
        "float",
        "half",
        "bfloat16",
        "type",
        "type_as",
        "clone",
        "detach",
    )
)
MOVING = frozenset(
    (
        "view",
        "reshape",
        "transpose",
        "swapaxes",
        "permute",
        "movedim",
        "contiguous",
        "flatten",
        "unflatten",
        "expand",
        "unsqueeze",
        "squeeze",
        "repeat",
        "repeat_interleave",
        "__getitem__",
        "chunk",
        "split",
        "unbind",
        "cat",
        "concat",
    )
)
PRODUCTS = frozenset(("mul", "multiply"))
SUMS = frozenset(("add",))
NORMS = {"layer_norm": (2, 3), "rms_norm": (2, None)}  # positions of weight and bias


@dataclass(frozen=True)
class InputSource:
    """What has made the input of some layers.

    Attributes:
        readers: the layers that are called with it, sorted.
        layer: the watched layer whose output channels can be scaled; None: `parameters` can.
        parameters: dotted names of the parameters to divide.
        rows: whether the first of them is a matrix with an output channel in each row.
        channels: for each input channel of the readers the channel of the parameters or of the
            layer's output; None: the same.
        reason: why factors have to stay at the input; None if they can be moved.
    """

    readers: tuple[str, ...]
    layer: str | None = None
    parameters: tuple[str, ...] = ()
    rows: bool = False
    channels: tuple[int, ...] | None = None
    reason: str | None = None


class _Stays(Exception):
    """Why factors have to stay."""


# A call, the value that it passes on, and the one that it gives.
_Step = tuple[OpCall, int, int]


@dataclass(frozen=True)
class _Origin:
    """What can be scaled, and the shape of what it makes."""

    layer: str | None = None
    parameters: tuple[str, ...] = ()
    rows: bool = False
    shape: tuple[int, ...] = ()


def input_sources(trace: Trace) -> list[InputSource]:
    """The source of each input of the layers that were written down as `ONE_CALL`.

    Args:
        trace: one run of the model.

    Returns:
        One entry for each value that such layers were called with, in order of the run.
    """
    return _Sources(trace).found()


class _Sources:
    """The search in one trace."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._makers = {value: op for op in trace.ops for value in op.outputs}
        self._readers: dict[int, list[OpCall]] = {}
        for op in trace.ops:
            for value in op.inputs:
                self._readers.setdefault(value, []).append(op)
        self._calls = Counter(op.scopes[-1] for op in trace.ops if op.function == ONE_CALL)
        self._parameter_reads = Counter(
            operand.parameter
            for op in trace.ops
            for operand in _operands((op.args, op.kwargs))
            if operand.parameter is not None
        )

    def found(self) -> list[InputSource]:
        values = dict.fromkeys(op.inputs[0] for op in self._trace.ops if op.function == ONE_CALL)
        return [self._source(value) for value in values]

    def _source(self, value: int) -> InputSource:
        readers = self._readers[value]
        layers = tuple(sorted(op.scopes[-1] for op in readers if op.function == ONE_CALL))
        try:
            repeated = [name for name in layers if self._calls[name] > 1]
            if repeated:
                raise _Stays(f"{repeated[0]} is called several times in one pass")
            others = [op.function for op in readers if op.function != ONE_CALL]
            if others:
                raise _Stays(f"something else reads its input too ({others[0]})")
            self._check_inside(value)
            shape = _operand_of(readers[0], value).shape
            steps: list[_Step] = []
            origin = self._walk(value, shape, steps)
            channels = _channels(origin, steps, shape)
            return InputSource(layers, origin.layer, origin.parameters, origin.rows, channels)
        except _Stays as why:
            return InputSource(layers, reason=str(why))

    def _check_inside(self, value: int) -> None:
        if value in self._trace.outputs:
            raise _Stays("its input leaves the model as an output")
        if value in self._trace.read_out:
            raise _Stays("its input is read outside of torch")

    def _walk(self, value: int, shape: tuple[int, ...], steps: list[_Step]) -> _Origin:
        """Goes back to what can be scaled; `steps` are the calls on the way, the last one first."""
        op = self._makers.get(value)
        if op is None:
            raise _Stays("its input comes from outside of what runs")
        name = _plain(op.function)
        if op.function == ONE_CALL:
            if self._calls[op.scopes[-1]] > 1:
                raise _Stays(f"{op.scopes[-1]} is called several times in one pass")
            return _Origin(layer=op.scopes[-1], shape=shape)
        if name == "linear":
            parameters = self._own(op.argument(1, "weight"), op.argument(2, "bias"))
            return _Origin(parameters=parameters, rows=True, shape=shape)
        if name in NORMS and len(op.argument(1, "normalized_shape")) == 1:
            at_weight, at_bias = NORMS[name]
            bias = None if at_bias is None else op.argument(at_bias, "bias")
            weight = op.argument(at_weight, "weight")
            return _Origin(parameters=self._own(weight, bias), shape=shape)
        if name in PRODUCTS or name in SUMS:
            return self._walk_pair(op, name, value, shape, steps)
        source = self._passed_on(op, name)
        if source is None:
            raise _Stays(f"its input is made by {op.function}")
        self._check_sole(source.value)
        steps.append((op, source.value, value))
        return self._walk(source.value, source.shape, steps)

    def _walk_pair(
        self,
        op: OpCall,
        name: str,
        value: int,
        shape: tuple[int, ...],
        steps: list[_Step],
    ) -> _Origin:
        """Back over a product of two, of which one can be scaled, or a sum with a bias."""
        pair = [op.argument(0, "input"), op.argument(1, "other")]
        for one, other in (pair, pair[::-1]):
            if not isinstance(one, Operand) or one.parameter is None:
                continue
            if one.shape[-1:] != shape[-1:] or any(size != 1 for size in one.shape[:-1]):
                continue
            if name in PRODUCTS:
                return _Origin(parameters=self._own(one), shape=shape)
            if isinstance(other, Operand) and other.shape == shape and not op.kwargs:
                self._check_sole(other.value)
                before: list[_Step] = []
                origin = self._walk(other.value, shape, before)
                if origin.parameters and not before:
                    bias = self._own(one)
                    return _Origin(parameters=origin.parameters + bias, rows=origin.rows,
                                   shape=shape)  # fmt: skip
        if name in SUMS:
            raise _Stays("its input is made by add")
        why: _Stays | None = None
        for one, other in (pair, pair[::-1]):
            if not isinstance(one, Operand) or one.shape != shape or one.parameter is not None:
                continue
            number = len(steps)
            try:
                if isinstance(other, Operand) and other.value == one.value:
                    raise _Stays("its input is a square")
                self._check_sole(one.value)
                steps.append((op, one.value, value))
                return self._walk(one.value, shape, steps)
            except _Stays as reason:
                del steps[number:]
                why = reason
        raise why or _Stays(f"its input is made by {op.function}")

    def _passed_on(self, op: OpCall, name: str) -> Operand | None:
        """The operand whose channels a call passes on; None if it does not."""
        if name in ("cat", "concat"):
            parts = [part for part in _operands(op.argument(0, "tensors")) if 0 not in part.shape]
            return parts[0] if len(parts) == 1 else None
        if name == "scaled_dot_product_attention":
            value = op.argument(2, "value")
            return (
                value if isinstance(value, Operand) and op.inputs.count(value.value) == 1 else None
            )
        if name in ("matmul", "bmm"):
            pair = [
                op.argument(0, "input"),
                op.argument(1, "other" if name == "matmul" else "mat2"),
            ]
            first, second = pair
            if isinstance(first, Operand) and isinstance(second, Operand):
                return second if first.value != second.value else None
            return None
        if name in PASSING or name in MOVING:
            x = op.argument(0, "input")
            if isinstance(x, Operand) and x.parameter is None:
                return x
        return None

    def _check_sole(self, value: int) -> None:
        if len(self._readers[value]) > 1:
            functions = [op.function for op in self._readers[value]]
            raise _Stays(f"what its input comes from is read elsewhere too ({functions[-1]})")
        self._check_inside(value)

    def _own(self, *operands: Any) -> tuple[str, ...]:
        """Names of operands that are parameters of the model, each read once."""
        names = []
        for operand in operands:
            if operand is None:
                continue
            if not isinstance(operand, Operand) or operand.parameter is None:
                raise _Stays("its input is scaled by what is no parameter of the model")
            if self._parameter_reads[operand.parameter] > 1:
                raise _Stays(f"{operand.parameter} is read several times in one pass")
            names.append(operand.parameter)
        if not names:
            raise _Stays("its input comes from a norm without weights")
        return tuple(names)


def _plain(function: str) -> str:
    """A function's name without the mark of working in place."""
    return function if function.endswith("__") else function.removesuffix("_")


def _operands(value: Any) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _operands(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _operands(item)


def _operand_of(op: OpCall, value: int) -> Operand:
    return next(one for one in _operands((op.args, op.kwargs)) if one.value == value)


def _channels(
    origin: _Origin, steps: list[_Step], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """For each channel of the last axis of `shape`, the origin's; None where they are the same."""
    kept = PASSING | PRODUCTS
    if all(_plain(op.function) in kept for op, _, _ in steps):
        return None
    numbers = torch.arange(origin.shape[-1], dtype=torch.int32).expand(origin.shape)
    for op, source, result in reversed(steps):
        numbers = _moved(op, source, result, numbers)
    if tuple(numbers.shape) != shape:
        raise _Stays("its channels cannot be followed")
    rows = numbers.reshape(-1, shape[-1])
    if not len(rows) or bool((rows != rows[:1]).any()):
        raise _Stays("its channels are not the same for all tokens")
    channels = rows[0].tolist()
    return None if channels == list(range(origin.shape[-1])) else tuple(channels)


def _moved(op: OpCall, source: int, result: int, numbers: Tensor) -> Tensor:
    """The channels' numbers behind one call."""
    name = _plain(op.function)
    if name in PASSING or name in PRODUCTS or name in ("cat", "concat"):
        return numbers
    if name in ("matmul", "bmm", "scaled_dot_product_attention"):
        return _summed_over_tokens(op, name, numbers)
    rest = (op.args[1:], op.kwargs)
    if any(True for _ in _operands(rest)):
        raise _Stays(f"its input is moved by {op.function}, by numbers of the run")
    # Tuples are lists in a trace.
    args = [tuple(one) if isinstance(one, list) else one for one in op.args[1:]]
    try:
        moved = getattr(numbers, name)(*args, **op.kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError):
        raise _Stays(f"its channels cannot be followed through {op.function}") from None
    if isinstance(moved, Tensor):
        return moved
    one: Tensor = moved[op.outputs.index(result)]
    return one


def _summed_over_tokens(op: OpCall, name: str, numbers: Tensor) -> Tensor:
    """Behind a product that sums over the last axis but one, such as attention over its values."""
    first = op.argument(0, "query" if name.startswith("scaled") else "input")
    assert isinstance(first, Operand)
    if op.kwargs.get("enable_gqa"):
        numbers = numbers.repeat_interleave(first.shape[-3] // numbers.shape[-3], dim=-3)
    if numbers.dim() < 2 or numbers.shape[:-2] != first.shape[:-2]:
        raise _Stays(f"its channels cannot be followed through {name}")
    if bool((numbers != numbers[..., :1, :]).any()):
        raise _Stays(f"{name} mixes its channels")
    return numbers[..., :1, :].expand(*first.shape[:-1], numbers.shape[-1])
