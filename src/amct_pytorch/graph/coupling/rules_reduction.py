"""What sums, means, softmax and products of matrices do to labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from amct_pytorch.graph.coupling.labels import along, carried, stays, varying
from amct_pytorch.graph.coupling.propagation import Propagation, name_of, operands, place, rule
from amct_pytorch.graph.coupling.rules_elementwise import several
from amct_pytorch.graph.trace import OpCall, Operand

Results = Sequence[Tensor] | None

_REDUCING = """
    sum mean amax amin max min argmax argmin var std norm logsumexp prod any all median nanmean
    nansum std_mean var_mean vector_norm linalg_vector_norm linalg_norm aminmax count_nonzero
"""
_ALONG_ONE = "softmax log_softmax softmin normalize cumsum cumprod sort logcumsumexp"


@rule(*_REDUCING.split())
def reduction(flow: Propagation, op: OpCall) -> Results:
    """Axes vanish; a channel less is a term less in a sum, and another mean."""
    found = operands([op.args, op.kwargs])
    if len(found) > 1:
        return several(flow, op)  # max(a, b)
    x = found[0]
    position = 2 if name_of(op) in ("norm", "vector_norm", "linalg_vector_norm") else 1
    dims = op.argument(position, "dim")
    dims = op.kwargs.get("axis") if dims is None else dims
    rank = len(x.shape)
    if dims is None or dims == [] or dims == ():
        axes = set(range(rank))
    elif isinstance(dims, (int, list, tuple)):
        axes = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    else:
        return None
    labels = flow.of(x)
    if not axes.isdisjoint(varying(labels)):
        if name_of(op) != "sum":
            flow.freeze(labels, f"{place(op)} is taken over it")
        labels = stays(x.shape)
    kept = labels
    for axis in axes:
        kept = kept.narrow(axis, 0, 1)
    results = []
    for shape in op.shapes:
        if len(shape) == rank:
            results.append(kept)
        else:
            gone = kept
            for axis in sorted(axes, reverse=True):
                gone = gone.squeeze(axis)
            results.append(gone)
    return results


@rule(*_ALONG_ONE.split())
def along_one(flow: Propagation, op: OpCall) -> Results:
    """Entries along an axis depend on each other."""
    x = op.argument(0, "input")
    if not isinstance(x, Operand) or any(shape != x.shape for shape in op.shapes):
        return None
    dim = op.kwargs.get("dim")
    if dim is None:
        position = 2 if name_of(op) == "normalize" else 1
        default = {"normalize": 1, "sort": -1}.get(name_of(op))
        dim = op.args[position] if len(op.args) > position else default
    labels = flow.of(x)
    if not isinstance(dim, int) or dim % len(x.shape) in varying(labels):
        return flow.leave(op, f"{place(op)} is taken over it")
    return [labels for _ in op.shapes]


@rule("glu")
def glu(flow: Propagation, op: OpCall) -> Results:
    """One half of an axis gates the other."""
    x = op.argument(0, "input")
    dim = op.argument(1, "dim")
    if not isinstance(x, Operand):
        return None
    axis = (-1 if dim is None else dim) % len(x.shape)
    labels = flow.of(x)
    if axis not in varying(labels):
        return [labels.narrow(axis, 0, op.shapes[0][axis])]
    first, second = np.split(flow.vector(x, axis, op), 2)
    flow.sets.tie(first, second, f"{place(op)} joins it with what stays")
    return [along(flow.sets.roots(first), axis, op.shapes[0])]


@rule("matmul", "bmm", "mm", "__matmul__", "__rmatmul__")
def matrix_product(flow: Propagation, op: OpCall) -> Results:
    """Rows by columns, batch by batch."""
    found = operands([op.args, op.kwargs])
    if len(found) != 2:
        return None
    if name_of(op) == "__rmatmul__":
        found = found[::-1]
    a, b = found
    if len(a.shape) < 2 or len(b.shape) < 2:
        return None
    rank = len(op.shapes[0])
    batch = [f"batch{i}" for i in range(rank - 2)]
    return contract(
        flow,
        op,
        [
            (a, [*batch[rank - len(a.shape) :], "rows", "inner"]),
            (b, [*batch[rank - len(b.shape) :], "inner", "columns"]),
        ],
        [*batch, "rows", "columns"],
    )


@rule("scaled_dot_product_attention")
def attention(flow: Propagation, op: OpCall) -> Results:
    """Queries by keys, then by values; its own scale is that of the size it finds."""
    q, k, v = (op.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    if not (isinstance(q, Operand) and isinstance(k, Operand) and isinstance(v, Operand)):
        return None
    rank = len(q.shape)
    if op.kwargs.get("scale") is None and rank - 1 in varying(flow.of(q)):
        return flow.leave(op, f"{place(op)} scales by the number of channels of a head")
    mask = op.argument(3, "attn_mask")
    if isinstance(mask, Operand) and carried(flow.of(mask)):
        return None
    batch = [f"batch{i}" for i in range(rank - 2)]
    others = batch
    if rank > 3 and k.shape[-3] != q.shape[-3]:
        # Several heads of queries share one of keys and values (enable_gqa).
        if not _share_heads(flow, op, q, (k, v)):
            return None
        others = [*batch[:-1], "shared"]
    return contract(
        flow,
        op,
        [
            (q, [*batch, "queries", "inner"]),
            (k, [*others, "keys", "inner"]),
            (v, [*others, "keys", "columns"]),
        ],
        [*batch, "queries", "columns"],
    )


def _share_heads(flow: Propagation, op: OpCall, q: Operand, shared: Sequence[Operand]) -> bool:
    """Ties heads of keys and values to the heads of queries that use them."""
    several = q.shape[-3] // shared[0].shape[-3]
    axis = len(q.shape) - 3
    heads = [axis in varying(flow.of(operand)) for operand in (q, *shared)]
    if any(heads) and not all(heads):
        return False
    if any(heads):
        for operand in shared:
            spread = np.repeat(flow.vector(operand, axis, op), several)
            reason = f"{place(op)} joins it with what stays"
            flow.sets.tie(flow.vector(q, axis, op), spread, reason)
    return True


@rule("einsum")
def einsum(flow: Propagation, op: OpCall) -> Results:
    """Letters that stand for the same axis in several operands."""
    equation = op.args[0]
    found = operands(op.args[1:])
    if not isinstance(equation, str) or "." in equation:
        return None
    terms, _, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if "->" not in equation or len(letters) != len(found):
        return None
    if any(len(set(term)) != len(term) for term in letters):
        return None
    pairs = [(operand, list(term)) for operand, term in zip(found, letters, strict=True)]
    return contract(flow, op, pairs, list(result))


def contract(
    flow: Propagation,
    op: OpCall,
    terms: Sequence[tuple[Operand, Sequence[str]]],
    result: Sequence[str],
) -> Results:
    """Sums of products: axes of the same name are one axis.

    Args:
        flow: knows the labels.
        op: the call.
        terms: the operands with a name for each of their axes.
        result: names of the result's axes.
    """
    changing: dict[str, list[np.ndarray]] = {}
    for operand, names in terms:
        axes = varying(flow.of(operand))
        if len(axes) > 1:
            return flow.leave(op, f"{place(op)} mixes several axes of it")
        for axis in axes:
            changing.setdefault(names[axis], []).append(flow.vector(operand, axis, op))
    for name, vectors in changing.items():
        for operand, names in terms:
            if name not in names:
                continue
            axis = list(names).index(name)
            if axis not in varying(flow.of(operand)) and operand.shape[axis] > 1:
                # It has that axis too, and nothing there that could go with the channels.
                for one in vectors:
                    flow.freeze(one, f"{place(op)} joins it with what stays")
        if any(len(other) not in (1, len(vectors[0])) for other in vectors):
            return flow.leave(op, f"{place(op)} repeats it")
        for other in vectors[1:]:
            flow.sets.tie(vectors[0], other, f"{place(op)} joins it with what stays")
    left = [name for name in result if name in changing]
    if len(left) > 1:
        return flow.leave(op, f"{place(op)} makes a table of pairs of its channels")
    shape = op.shapes[0]
    if not left:
        return [stays(shape)]
    channels = flow.sets.roots(changing[left[0]][0])
    return [along(channels, list(result).index(left[0]), shape)]
