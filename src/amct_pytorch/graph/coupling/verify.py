"""Whether a pruned network does what its graph said it would: its own run, held against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from amct_pytorch.graph.coupling.labels import ChannelSets, compact, varying
from amct_pytorch.graph.coupling.numbers import Numbers, numbers_in
from amct_pytorch.graph.coupling.propagation import Propagation, operands, place
from amct_pytorch.graph.coupling.rules_movement import MOVING, moved
from amct_pytorch.graph.look import copy_sharing_weights
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import OpCall, Trace, trace_until


@dataclass(frozen=True)
class Broken:
    """The first call that differs from what was foreseen.

    Attributes:
        call: its index in the run of the whole network.
        reason: what it did.
    """

    call: int
    reason: str


def verify(
    flow: Propagation,
    alive: np.ndarray,
    pruned: nn.Module,
    inputs: ModelInputs,
    training: bool = False,
) -> tuple[Trace, Broken | None]:
    """Runs a pruned network and compares every call with the whole network's.

    Each has to have results of the size foreseen, calls that move data have to move the
    channels that are left to where the graph says, and numbers that are computed with must not
    come from the number of channels: a size written into the forward (``x.view(n, 64)``,
    ``x[:, :32]``), or taken from it (``x.sum(1) / x.shape[1]``) shows here.

    Args:
        flow: the whole network's run with its labels.
        alive: whether each label stays.
        pruned: the pruned network.
        inputs: what the whole network was run on.
        training: whether in training mode.

    Returns:
        The pruned network's run, and the first call that differs.
    """
    trace, error = trace_until(copy_sharing_weights(pruned).train(training), inputs)
    numbers = Numbers(trace, pruned, inputs, training)
    return trace, _compare(flow, alive, trace, error, numbers)


def _compare(
    flow: Propagation, alive: np.ndarray, trace: Trace, error: Exception | None, numbers: Numbers
) -> Broken | None:
    foreseen = _Foreseen(flow, alive)
    for was, now in zip(flow.trace.ops, trace.ops, strict=False):
        reason = foreseen.differs(was, now, trace)
        if reason is not None:
            return Broken(was.index, reason)
        if numbers_in(was) != numbers_in(now) and not numbers.from_values(now):
            return Broken(
                foreseen.channels_before(was),
                f"{place(was)} computes with the number of its channels",
            )
    ran, should = len(trace.ops), len(flow.trace.ops)
    if error is not None and ran < should:
        was = flow.trace.ops[ran]
        return Broken(
            was.index, f"{place(was)} does not work with fewer channels: {_first_line(error)}"
        )
    if error is not None or ran != should:
        return Broken(flow.trace.ops[-1].index, "the forward takes another way with fewer channels")
    return None


class _Foreseen:
    """What the graph says of the pruned network's run."""

    def __init__(self, flow: Propagation, alive: np.ndarray) -> None:
        self._flow = flow
        self._alive = alive
        self._known: dict[int, Tensor | None] = {}
        self._replay = _Replay(flow.sets)

    def differs(self, was: OpCall, now: OpCall, trace: Trace) -> str | None:
        """What one call did otherwise, or None."""
        if was.function != now.function or len(was.outputs) != len(now.outputs):
            return f"the forward takes another way with fewer channels before {place(was)}"
        if was.index in self._flow.needless:
            return None
        wanted = [self._left(value) for value in was.outputs]
        for labels, shape in zip(wanted, now.shapes, strict=True):
            if labels is None or tuple(labels.shape) != shape:
                size = "nothing" if labels is None else list(labels.shape)
                return f"{place(was)} gives {list(shape)} with fewer channels, not {size}"
        if was.function not in MOVING:
            return None
        sources = operands([was.args, was.kwargs])
        targets = operands([now.args, now.kwargs])
        if not any(self._changed(operand.value) for operand in sources):
            return None
        self._replay.labels = {
            target.value: labels
            for source, target in zip(sources, targets, strict=False)
            if source.value in self._flow.labels
            and (labels := self._left(source.value)) is not None
        }
        self._replay.trace = trace
        found = moved(self._replay, now)
        if found is None:
            return f"{place(was)} cannot be followed with fewer channels"
        for labels, one in zip(wanted, found, strict=True):
            assert labels is not None
            rooted = torch.from_numpy(self._flow.sets.roots(one.contiguous().numpy()))
            if not torch.equal(labels, rooted):
                return f"{place(was)} takes other channels when there are fewer"
        return None

    def channels_before(self, was: OpCall) -> int:
        """The last call with channels that go in its inputs, of those that a call comes from.

        Of all calls before it, if there is none among them.
        """
        calls = self._flow.trace.ops[was.index :: -1]
        values, others = set(was.inputs), []
        for op in calls:
            changes = any(
                value in self._flow.labels and self._changed(value) for value in op.inputs
            )
            if op is was or not values.isdisjoint(op.outputs):
                if changes:
                    return op.index
                values.update(op.inputs)
            elif changes:
                others.append(op.index)
        return others[0] if others else was.index

    def _changed(self, value: int) -> bool:
        labels = self._flow.labels.get(value)
        left = None if labels is None else self._left(value)
        return left is None or labels is None or left.shape != labels.shape

    def _left(self, value: int) -> Tensor | None:
        """The labels of a value in the pruned network; None if nothing of it is left."""
        if value not in self._known:
            self._known[value] = self._cut(self._flow.labels[value])
        return self._known[value]

    def _cut(self, labels: Tensor) -> Tensor | None:
        labels = compact(labels, self._flow.sets)
        axes = varying(labels)
        small = labels
        for axis in range(labels.dim()):
            if axis not in axes and labels.shape[axis] > 1:
                small = small.narrow(axis, 0, 1)
        left = torch.from_numpy(np.asarray(self._alive[small.contiguous().numpy()]))
        if not bool(left.any()):
            return None
        shape = list(labels.shape)
        for axis in axes:
            rows = left.movedim(axis, 0).reshape(left.shape[axis], -1).any(1).nonzero().flatten()
            small, left = small.index_select(axis, rows), left.index_select(axis, rows)
            shape[axis] = len(rows)
        # Of a box, nothing inside is missing.
        return small.expand(shape) if bool(left.all()) else None


class _Replay(Propagation):
    """Just enough of a propagation to run one call of the pruned network on labels."""

    def __init__(self, sets: ChannelSets) -> None:
        super().__init__(Trace(), {})
        self.sets = sets


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
