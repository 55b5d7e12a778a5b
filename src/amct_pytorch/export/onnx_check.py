"""Whether an ONNX graph is put together as one, before anything walks over it.

onnx.checker would refuse a deploy model, whose operators it does not know; ONNX Runtime alone
would speak of a graph that has been rewritten since.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, defs, helper, numpy_helper

from amct_pytorch.errors import ExportError, ProblemList, shown
from amct_pytorch.export.stored import with_data

DEFAULT_DOMAINS = ("", "ai.onnx")
_FLOAT, _INT, _STRING = AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING
# The deploy model's own operators: number of inputs, and the types of their attributes.
_NUMBER = (_FLOAT, _INT)
_OWN: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "AscendQuant": (1, {"scale": _NUMBER, "offset": _NUMBER, "dst_type": (_STRING,)}),
    "AscendDequant": (2, {"dtype": (_INT,)}),
}


def check_graph(model: onnx.ModelProto, source: str) -> None:
    """Refuse a model in which something is missing, there twice, or of the wrong kind.

    Looked at are: tensors (type, size, name), nodes (number of inputs and outputs, kinds of
    attributes), and that every tensor that is read is made exactly once.

    Args:
        model: with its tensors' data, loaded or stored (see `export.stored`).
        source: what it was read from, for messages.

    Raises:
        ExportError: all problems in one error (up to ten).
    """
    problems = ProblemList(f"{source}: not a sound ONNX model", ExportError)
    versions = [o.version for o in model.opset_import if o.domain in DEFAULT_DOMAINS]
    opset = max(versions, default=0)
    if opset < 1:
        problems.add(f"the version of the default operator set is {opset}; allowed: >= 1")
    _check_graph(model.graph, opset, set(), problems)
    problems.raise_if_any()


def _check_graph(graph: GraphProto, opset: int, outer: set[str], problems: ProblemList) -> None:
    known = set(outer)
    constants: set[str] = set()
    for tensor in graph.initializer:
        _check_tensor(tensor, problems)
        if tensor.name in constants:
            problems.add(f"tensor {shown(tensor.name)} is there more than once")
        constants.add(tensor.name)
    known |= constants | {t.values.name for t in graph.sparse_initializer}
    made: set[str] = set(constants)
    for value in graph.input:
        # A constant may stand among the inputs too: then it is that input's default.
        if value.name in made - constants:
            problems.add(f"input {shown(value.name)} is there more than once")
        made.add(value.name)
    for node in graph.node:
        if not any(node.output):
            problems.add(f"{_called(node)} has no output")
        for name in filter(None, node.output):
            if name in made:
                problems.add(f"{_called(node)} makes {shown(name)}, which is there already")
            made.add(name)
    known |= made
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                problems.add(f"{_called(node)} reads {shown(name)}, which nothing makes")
        _check_operands(node, opset, problems)
        for attribute in node.attribute:
            _check_attribute(node, attribute, opset, problems)
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _check_graph(inner, opset, known, problems)
    for value in graph.output:
        if value.name not in known:
            problems.add(f"output {shown(value.name)} is made by nothing")


def _called(node: NodeProto) -> str:
    return f"node {shown(node.name)} ({node.op_type})"


def _check_tensor(tensor: TensorProto, problems: ProblemList) -> None:
    what = f"tensor {shown(tensor.name)}"
    if not tensor.name:
        problems.add("a tensor has no name")
    try:
        numpy_helper.to_array(with_data(tensor))
    except Exception as error:  # onnx raises whatever its arithmetic stumbles on
        problems.add(
            f"{what} cannot be read (type {tensor.data_type}, shape {list(tensor.dims)[:8]}): "
            f"{str(error)[:200]}"
        )


def _schema(node: NodeProto, opset: int) -> defs.OpSchema | None:
    if node.domain in DEFAULT_DOMAINS and defs.has(node.op_type, opset):
        return defs.get_schema(node.op_type, opset)
    return None


def _check_operands(node: NodeProto, opset: int, problems: ProblemList) -> None:
    needed, most = 0, len(node.input)
    schema = _schema(node, opset)
    if node.op_type in _OWN:
        needed = most = _OWN[node.op_type][0]
    elif schema is not None:
        needed, most = schema.min_input, schema.max_input
    if not needed <= len(node.input) <= most or not all(node.input[:needed]):
        problems.add(f"{_called(node)} has {_count(node.input)} inputs; {needed} are needed")


def _count(names: Iterable[str]) -> int:
    return sum(bool(name) for name in names)


def _check_attribute(
    node: NodeProto, attribute: AttributeProto, opset: int, problems: ProblemList
) -> None:
    schema = _schema(node, opset)
    allowed: tuple[int, ...] | None = None
    if node.op_type in _OWN:
        allowed = _OWN[node.op_type][1].get(attribute.name)
    elif schema is not None and attribute.name in schema.attributes:
        kind: Any = schema.attributes[attribute.name].type
        allowed = (int(kind.value),)
    if sum(other.name == attribute.name for other in node.attribute) > 1:
        problems.add(f"{_called(node)} has the attribute {attribute.name!r} more than once")
    if allowed is not None and attribute.type not in allowed:
        names = " or ".join(AttributeProto.AttributeType.Name(kind) for kind in allowed)
        problems.add(f"{_called(node)}: the attribute {attribute.name!r} is not of type {names}")
        return
    try:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value.decode()
        elif isinstance(value, TensorProto):
            numpy_helper.to_array(value)
    except Exception as error:  # as for tensors
        problems.add(f"{_called(node)}: the attribute {attribute.name!r}: {str(error)[:200]}")
