"""Half precision made float32 in an ONNX graph, for runtimes that cannot compute in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

# Integer attributes that name a tensor type.
TYPE_ATTRIBUTES = frozenset({"to", "dtype"})
# AscendDequant counts types in its own way; 0 is float32.
DEQUANT = "AscendDequant"


def widen(model: ir.Model, types: Collection[ir.DataType], *, borders: bool) -> None:
    """Makes every tensor of the given types float32, in place; values stay what they are.

    Results are at least as precise as before: what was rounded between two operators no longer
    is.

    Args:
        model: the model, its subgraphs included; functions must be inlined.
        types: BFLOAT16, FLOAT16 or both.
        borders: whether the model's inputs and outputs keep their types, with a Cast each,
            or become float32 too.
    """
    if borders:
        _add_casts(model.graph, types)
    for graph in (model.graph, *model.graph.subgraphs()):
        kept = {id(value) for value in (*graph.inputs, *graph.outputs) if borders}
        for value in _values(graph):
            if value.dtype in types and id(value) not in kept:
                value.dtype = ir.DataType.FLOAT
                if value.const_value is not None:
                    value.const_value = _widened(value.const_value)
        for node in graph:
            _widen_attributes(node, types, {id(value) for value in node.outputs} & kept)
        _drop_casts(graph)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _widen_attributes(node: ir.Node, types: Collection[ir.DataType], kept: set[int]) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in types:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
        elif node.op_type == DEQUANT and name == "dtype":
            if ir.DataType.FLOAT16 in types and not kept:
                node.attributes[name] = ir.AttrInt64(name, 0)
        elif (
            attribute.type == ir.AttributeType.INT
            and name in TYPE_ATTRIBUTES
            and attribute.as_int() in types
            and not kept
        ):
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


def _add_casts(graph: ir.Graph, types: Collection[ir.DataType]) -> None:
    """Parts the graph's inputs and outputs of the given types from what computes with them."""
    for value in graph.inputs:
        if value.dtype in types:
            cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
            _describe(cast.outputs[0], f"{value.name}.float32", value)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            cast.replace_input_with(0, value)
            if graph.num_nodes():
                graph.insert_before(graph.node(0), cast)
            else:
                graph.append(cast)
    for i, value in enumerate(graph.outputs):
        if value.dtype in types:
            assert value.dtype is not None
            cast = ir.node("Cast", [value], attributes={"to": int(value.dtype)})
            output = cast.outputs[0]
            output.name, output.shape, output.dtype = value.name, value.shape, value.dtype
            graph.outputs[i] = output
            value.name = f"{value.name}.float32"
            graph.append(cast)


def _describe(value: ir.Value, name: str, like: ir.Value) -> None:
    value.name, value.shape, value.dtype = name, like.shape, ir.DataType.FLOAT


def _drop_casts(graph: ir.Graph) -> None:
    """Removes casts of float32 to float32 that widening left."""
    for node in list(graph):
        if node.op_type != "Cast" or node.inputs[0] is None:
            continue
        source, result = node.inputs[0], node.outputs[0]
        same = node.attributes.get_int("to", 0) == ir.DataType.FLOAT == source.dtype
        if same and result not in graph.outputs:
            ir.convenience.replace_all_uses_with(result, source)
            graph.remove(node, safe=True)
