"""Numbers that a forward computes with, and whether they come from sizes or from values."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import nn

from amct_pytorch.graph.coupling.propagation import name_of
from amct_pytorch.graph.coupling.rules_elementwise import ONE, SEVERAL
from amct_pytorch.graph.look import copy_model
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import OpCall, Trace, trace_until

# Functions that compute with every number they are given, and those that do with one only.
_WITH_ALL = frozenset(f"{ONE} {SEVERAL} tensor as_tensor asarray scalar_tensor new_tensor".split())
_WITH_ONE = {
    "full": (1, "fill_value"),
    "full_like": (1, "fill_value"),
    "new_full": (2, "fill_value"),
    "fill": (1, "value"),
    "__setitem__": (2, "value"),
    "scaled_dot_product_attention": (6, "scale"),
}
# Weights are changed by so much to see which numbers change with them.
OTHER = 1.25


def numbers_in(op: OpCall) -> list[float]:
    """The numbers that a call computes with, in order; sizes and axes are none of them."""
    name = name_of(op)
    name = name if name.startswith("__") else name.rstrip("_")
    if name in _WITH_ONE:
        return _flat(op.argument(*_WITH_ONE[name]))
    return _flat([op.args, op.kwargs]) if name in _WITH_ALL else []


def _flat(value: Any) -> list[float]:
    # Those of numpy too (np.prod(x.shape)).
    if isinstance(value, Real):
        # A NaN is the same number as another one here.
        return [float(value) if value == value else 0.0]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _flat(item)]
    return []


class Numbers:
    """The numbers of a pruned network's run.

    Args:
        trace: the run.
        pruned: the network.
        inputs: of the run.
        training: whether it was in training mode.
    """

    def __init__(
        self, trace: Trace, pruned: nn.Module, inputs: ModelInputs, training: bool
    ) -> None:
        self._trace = trace
        self._pruned = pruned
        self._inputs = inputs
        self._training = training
        self._other: Trace | None = None

    def from_values(self, op: OpCall) -> bool:
        """Whether a call's numbers depend on what tensors hold (``x.max().item()``).

        They do where they change with the weights; numbers made from sizes do not.
        """
        if not any(before <= op.index for before, _ in self._trace.decisions):
            return False
        if self._other is None:
            model = copy_model(self._pruned).train(self._training)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.mul_(OTHER)
            self._other, _ = trace_until(model, self._inputs)
        ops = self._other.ops
        return op.index < len(ops) and numbers_in(ops[op.index]) != numbers_in(op)
