"""Layers that a run did not reach, and branches by which another run could."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from amct_pytorch.graph.coupling.propagation import Propagation
from amct_pytorch.graph.look import copy_model
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import Trace, trace_until


def idle_layers(model: nn.Module, trace: Trace) -> tuple[str, ...]:
    """Modules with weights of their own that neither ran nor had them read, in module order."""
    read = {name.rpartition(".")[0] for name in trace.parameter_values}
    return tuple(
        path
        for path, module in model.named_modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        and path not in read
    )


def trace_of_more(model: nn.Module, inputs: ModelInputs, trace: Trace) -> tuple[Trace, bool]:
    """A run in training mode where that reaches layers that the one in eval mode does not.

    Auxiliary heads run in training only, and what they read has to stay in step with them.

    Args:
        model: left as it is.
        inputs: what to run it on.
        trace: of its run in eval mode.

    Returns:
        The run that reaches more, and whether it is the one in training mode.
    """
    idle = idle_layers(model, trace)
    if not idle:
        return trace, False
    other, error = trace_until(copy_model(model).train(), inputs)
    if error is not None or not set(idle_layers(model, other)) < set(idle):
        return trace, False
    return other, True


def freeze_branches(flow: Propagation, idle: Sequence[str]) -> None:
    """Leaves whole what another branch could hand to a layer that did not run, or take from it.

    Where Python looked at values in a module that holds such a layer, that is every tensor that
    was there at the time or was made after it in that module.

    Args:
        flow: the run.
        idle: layers that did not run.
    """
    ops = flow.trace.ops
    for before, scopes in flow.trace.decisions:
        module = scopes[-1] if scopes else ""
        missed = [path for path in idle if not module or path.startswith(f"{module}.")]
        if not missed:
            continue
        reason = f"a branch that depends on values could reach {missed[0]!r}, which did not run"
        later = [op for op in ops[before:] if module in op.scopes]
        values = {value for op in later for value in (*op.inputs, *op.outputs)}
        for value in values & flow.labels.keys():
            flow.freeze(flow.labels[value], reason)
