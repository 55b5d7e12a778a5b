"""Labels from tensor to tensor, through every call of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from amct_pytorch.graph.coupling.labels import (
    STAYS,
    ChannelSets,
    all_of,
    along,
    carried,
    compact,
    stays,
    varying,
    vector,
)
from amct_pytorch.graph.coupling.slots import BARE, Blocks, Role, Slot
from amct_pytorch.graph.tensors import tensors_in
from amct_pytorch.graph.trace import OpCall, Operand, Trace

Rule: TypeAlias = "Callable[[Propagation, OpCall], Sequence[Tensor] | None]"

# Weights read as tensors of their own get a label for each entry up to so many.
LARGEST_BARE = 1 << 20

# By the name of the function; the modules beside this one fill it.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers what a function does to labels: labels of its results from a call.

    A rule that returns None cannot follow the call; the channels that go into it then stay.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def name_of(op: OpCall) -> str:
    """The function's name; of a property (``x.T``) that of the property."""
    if op.function == "__get__":
        return str(getattr(getattr(op.target, "__self__", None), "__name__", op.function))
    return op.function


def place(op: OpCall) -> str:
    """``view in 'layer1.0' (net.py:12)``."""
    scope = next((scope for scope in reversed(op.scopes) if scope), "")
    where = f" in {scope!r}" if scope else ""
    path, _, line = op.site.rpartition(":")
    return f"{name_of(op)}{where}" + (f" ({Path(path).name}:{line})" if path else "")


def _in_place(function: str) -> bool:
    special = function.startswith("__")
    return (special and function.startswith(("__i", "__set"))) or function.endswith("_") != special


def operands(value: Any) -> list[Operand]:
    """Every tensor operand among the arguments of a call, in order."""
    if isinstance(value, Operand):
        return [value]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in operands(item)]
    if isinstance(value, dict):
        return operands(list(value.values()))
    return []


class Propagation:
    """What is known of the labels while a run is followed.

    Args:
        trace: the run.
        sizes: shape of each parameter and buffer, by name.
        shared: parameters and buffers that something else reads too, with the reason.
        free: which axis keeps its channels apart where a call spreads them over several, by the
            call's index; of the others the call's rule decides.
        whole: reasons why what goes into a call has to stay, by the call's index.

    Attributes:
        sets: of all labels.
        labels: of each value.
        slots: where channels lie.
        blocks: which channels have to keep equal numbers.
        joint: the axes over which a call spreads channels, and the one that keeps them apart.
        unfollowed: the calls that could not be followed, with the reason.
        needless: calls from which no output is computed (a value that is only looked at).
    """

    def __init__(
        self,
        trace: Trace,
        sizes: Mapping[str, tuple[int, ...]],
        shared: Mapping[str, str] = MappingProxyType({}),
        free: Mapping[int, int] = MappingProxyType({}),
        whole: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.trace = trace
        self.sets = ChannelSets()
        self.labels: dict[int, Tensor] = {}
        self.slots: list[Slot] = []
        self.blocks: list[Blocks] = []
        self.joint: dict[int, tuple[list[int], int]] = {}
        self.unfollowed: list[tuple[OpCall, str]] = []
        self._sizes = sizes
        self._shared = shared
        self._free = free
        self._whole = whole
        self._bare: dict[str, int] = {}
        self._loose: set[int] = set()
        needed = trace.reaching_output()
        self.needless = {
            op.index
            for op in trace.ops
            if needed.isdisjoint(op.outputs) and not _in_place(op.function)
        }
        self._reads = Counter(value for op in trace.ops for value in set(op.inputs))

    def run(self) -> None:
        """Follow every call, then see to weights read as tensors and to the outputs."""
        for op in self.trace.ops:
            if op.index in self.needless or self._nothing_goes_in(op):
                results: Sequence[Tensor] = [stays(shape) for shape in op.shapes]
            else:
                results = self._follow(op)
            self.labels.update(zip(op.outputs, results, strict=True))
        for name, value in self._bare.items():
            self._place_bare(name, value)
        for value in self.trace.outputs:
            if value in self.labels:
                self.freeze(self.labels[value], "it is the model's output")

    def _nothing_goes_in(self, op: OpCall) -> bool:
        return all(
            operand.parameter is None
            and operand.value not in self.trace.untraced
            and not carried(self.of(operand))
            for operand in operands([op.args, op.kwargs])
        )

    def _follow(self, op: OpCall) -> Sequence[Tensor]:
        name = name_of(op)
        known = RULES.get(name) or RULES.get(name.rstrip("_"))
        if op.index in self._whole:
            return self.leave(op, self._whole[op.index])
        if all(operand.value in self._loose for operand in operands([op.args, op.kwargs])):
            self._loose.update(op.outputs)
        found = known(self, op) if known is not None else None
        if found is not None and [tuple(t.shape) for t in found] == list(op.shapes):
            return [compact(labels, self.sets) for labels in found]
        what = "cannot be followed" if known else "is not known"
        return self.leave(op, f"it goes into {place(op)}, which {what}")

    def leave(self, op: OpCall, reason: str) -> Sequence[Tensor]:
        """What goes into a call stays, and so does what comes out of it."""
        if any(operand.value not in self._loose for operand in operands([op.args, op.kwargs])):
            self.unfollowed.append((op, reason))
        for operand in operands([op.args, op.kwargs]):
            if operand.parameter is None or operand.value in self.labels:
                self.freeze(self.of(operand), reason)
        return [stays(shape) for shape in op.shapes]

    def of(self, operand: Operand) -> Tensor:
        """The labels of an operand."""
        held = self.labels.get(operand.value)
        if held is not None:
            if varying(held):
                held = self.labels[operand.value] = compact(held, self.sets)
            return held
        if operand.parameter is not None:
            self.labels[operand.value] = self._of_bare(operand)
        else:
            if operand.value in self.trace.untraced:
                self._source_unseen(operand.value)
            self.labels[operand.value] = stays(operand.shape)
        return self.labels[operand.value]

    def _of_bare(self, operand: Operand) -> Tensor:
        assert operand.parameter is not None
        number = int(np.prod(operand.shape, dtype=np.int64))
        if not 1 < number <= LARGEST_BARE or operand.parameter in self._shared:
            return stays(operand.shape)
        self._bare[operand.parameter] = operand.value
        self._loose.add(operand.value)
        return torch.from_numpy(self.sets.new(number)).reshape(operand.shape)

    def _place_bare(self, name: str, value: int) -> None:
        labels = compact(self.labels[value], self.sets)
        axes = varying(labels)
        if len(axes) > 1:
            self.freeze(labels, f"the weight {name!r} is read as a tensor of its own")
        elif axes:
            found = vector(labels, axes[0], self.sets, "")
            reader = next(op for op in self.trace.ops if value in op.inputs)
            owner = name.rpartition(".")[0]
            self.slots.append(Slot(owner, name, axes[0], found, Role.FOLLOWS, BARE, reader.index))

    def _source_unseen(self, value: int) -> None:
        op = next(op for op in self.trace.ops if value in op.inputs)
        reason = (
            "code that torch functions do not show (a compiled extension, numpy) ran before "
            f"{place(op)} and may have read it"
        )
        self.unfollowed.append((op, reason))
        for source in self.trace.untraced[value]:
            if source in self.labels:
                self.freeze(self.labels[source], reason)

    def freeze(self, labels: Tensor | np.ndarray, reason: str) -> None:
        """These labels stay."""
        flat = all_of(labels) if isinstance(labels, Tensor) else labels
        self.sets.freeze(flat, reason)

    def vector(self, operand: Operand, axis: int, op: OpCall) -> np.ndarray:
        """One label for each entry of an operand along an axis."""
        return vector(self.of(operand), axis, self.sets, f"{place(op)} mixes it with what stays")

    def whose(self, operand: Any) -> str | None:
        """Why a call's weight cannot be cut, or None.

        Args:
            operand: the weight.
        """
        if not isinstance(operand, Operand) or operand.parameter is None:
            return "its weight is computed in the forward"
        if operand.parameter in self._shared:
            return self._shared[operand.parameter]
        if self._reads[operand.value] > 1:
            number = self._reads[operand.value]
            return f"reused layer: {operand.parameter!r} is read {number} times in one forward"
        if self._sizes.get(operand.parameter) != operand.shape:
            return "its weight is read in another shape"
        return None

    def slot(
        self,
        op: OpCall,
        operand: Any,
        axis: int,
        labels: np.ndarray,
        role: Role,
        kind: str,
        groups: int = 1,
    ) -> None:
        """Notes that an axis of a call's weight counts channels; nothing for None."""
        if isinstance(operand, Operand) and operand.parameter is not None:
            owner = operand.parameter.rpartition(".")[0]
            self.slots.append(
                Slot(owner, operand.parameter, axis, labels, role, kind, op.index, groups)
            )

    def follower(self, op: OpCall, labels: np.ndarray, kind: str) -> None:
        """Notes that the module of a call without weights counts channels."""
        owner = op.scopes[-1] if op.scopes else ""
        self.slots.append(Slot(owner, "", 0, labels, Role.FOLLOWS, kind, op.index))

    def balance(self, labels: np.ndarray, number: int, op: OpCall) -> None:
        """Notes that equal blocks of channels have to keep equal numbers."""
        if number > 1 and (labels != STAYS).any():
            self.blocks.append(Blocks(labels, number, place(op)))

    def apart(self, op: OpCall, labels: Tensor, prefer: Collection[int]) -> Tensor:
        """Ties labels so that they change along one axis only: what is left is a box then.

        Args:
            op: the call whose result has these labels.
            labels: of the result.
            prefer: the axes of which the last that counts is to keep its channels apart.
        """
        labels = compact(labels, self.sets)
        axes = varying(labels)
        if len(axes) < 2 or not self._loose.isdisjoint(op.outputs):
            return labels
        wanted = [axis for axis in axes if axis in prefer] or axes
        axis = self._free.get(op.index, wanted[-1])
        self.joint[op.index] = (axes, axis)
        reason = f"{place(op)} mixes it with what stays"
        return along(vector(labels, axis, self.sets, reason), axis, labels.shape)


def results_of(value: Any) -> list[Tensor]:
    """The tensors that a function returned."""
    return list(tensors_in(value))
