"""What the layers of a run cost: multiply-accumulates."""

from __future__ import annotations

import math

from amct_pytorch.graph.trace import OpCall, Operand, Trace


def macs_of(op: OpCall) -> int:
    """Multiply-accumulates of one convolution or linear call; 0 for other calls."""
    weight, x = op.argument(1, "weight"), op.argument(0, "input")
    if not isinstance(weight, Operand) or not isinstance(x, Operand):
        return 0
    if op.function.startswith("conv_transpose"):
        return math.prod(x.shape) * math.prod(weight.shape[1:])
    if op.function in ("conv1d", "conv2d", "conv3d", "linear"):
        return math.prod(op.shapes[0]) * math.prod(weight.shape[1:])
    return 0


def layer_macs(trace: Trace) -> dict[str, int]:
    """Multiply-accumulates of each module whose forward makes convolution or linear calls.

    Args:
        trace: of the run, whose whole input counts.

    Returns:
        By the path of the innermost module, in the order of the run; reused ones count each run.
    """
    found: dict[str, int] = {}
    for op in trace.ops:
        macs = macs_of(op)
        if macs:
            scope = op.scopes[-1] if op.scopes else ""
            found[scope] = found.get(scope, 0) + macs
    return found
