"""Surgery on ONNX graphs: who makes a tensor, who reads it, and putting nodes in between."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from amct_pytorch.errors import ExportError
from amct_pytorch.export.stored import with_data

DEFAULT_DOMAINS = ("", "ai.onnx")


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute (strings decoded), or `default` where it has none."""
    for attr in node.attribute:
        if attr.name == name:
            value = helper.get_attribute_value(attr)
            return value.decode() if isinstance(value, bytes) else value
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Give a node's attribute a value; None removes it."""
    kept = [attr for attr in node.attribute if attr.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a control-flow node holds."""
    for attr in node.attribute:
        if attr.type == AttributeProto.GRAPH:
            yield attr.g
        elif attr.type == AttributeProto.GRAPHS:
            yield from attr.graphs


def names_read(node: NodeProto) -> set[str]:
    """Names that a node reads, those its subgraphs take from outside included."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        own = {value.name for value in graph.input}
        own.update(tensor.name for tensor in graph.initializer)
        read = {value.name for value in graph.output}
        for inner in graph.node:
            own.update(inner.output)
            read |= names_read(inner)
        names |= read - own
    return names


def _replace_in_node(node: NodeProto, old: str, new: str) -> None:
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new
    for graph in subgraphs(node):
        for inner in graph.node:
            _replace_in_node(inner, old, new)
        for value in graph.output:
            if value.name == old:
                value.name = new


def depends_on(nodes: Sequence[NodeProto]) -> list[set[int]]:
    """For each node, the indices of the nodes whose outputs it reads."""
    made_by = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    return [{made_by[n] for n in names_read(node) if n in made_by} for node in nodes]


def topological_order(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes, each after those whose outputs it reads; else in the order given.

    Raises:
        ExportError: the graph has a cycle.
    """
    needs = depends_on(nodes)
    readers: list[list[int]] = [[] for _ in nodes]
    for i, sources in enumerate(needs):
        for source in sources:
            readers[source].append(i)
    open_inputs = [len(sources) for sources in needs]
    ready = [i for i, n in enumerate(open_inputs) if n == 0]
    order: list[NodeProto] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(nodes[i])
        for reader in readers[i]:
            open_inputs[reader] -= 1
            if open_inputs[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) != len(nodes):
        stuck = next(node for node, n in zip(nodes, open_inputs, strict=True) if n > 0)
        raise ExportError(f"the ONNX graph has a cycle through node {stuck.name!r}")
    return order


class OnnxGraph:
    """An ONNX model taken apart for editing; `model()` puts it together again.

    The model given is never changed. Weights are not copied until `model()`.

    Attributes:
        nodes: the graph's nodes, free to be edited, in no particular order.
        initializers: constant tensors by name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._source = model
        self.nodes: list[NodeProto] = []
        for node in model.graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            self.nodes.append(copy)
        self.initializers: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.inputs = [v for v in model.graph.input if v.name not in self.initializers]
        self.outputs: list[onnx.ValueInfoProto] = list(model.graph.output)
        self._types = {v.name: v for v in model.graph.value_info}
        self._taken = set(self.initializers) | self.input_names | self.output_names
        self._taken.update(name for node in self.nodes for name in (*node.output, node.name))
        self._counters: dict[str, int] = {}

    @property
    def input_names(self) -> set[str]:
        """Names of the graph's inputs."""
        return {value.name for value in self.inputs}

    @property
    def output_names(self) -> set[str]:
        """Names of the graph's outputs."""
        return {value.name for value in self.outputs}

    def producers(self) -> dict[str, NodeProto]:
        """Tensor name -> the node that makes it, as the graph is now."""
        return {name: node for node in self.nodes for name in node.output if name}

    def readers(self) -> dict[str, list[NodeProto]]:
        """Tensor name -> the nodes that read it, as the graph is now."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in names_read(node):
                found.setdefault(name, []).append(node)
        return found

    def count_reads(self, name: str) -> int:
        """How often nodes and graph outputs read a tensor."""
        inputs = sum(list(node.input).count(name) for node in self.nodes)
        inner = sum(name in names_read(n) and name not in n.input for n in self.nodes)
        return inputs + inner + (name in self.output_names)

    def fresh(self, name: str) -> str:
        """`name`, or with a number behind it where that is taken; taken from now on."""
        candidate = name
        while candidate in self._taken:
            self._counters[name] = self._counters.get(name, 0) + 1
            candidate = f"{name}_{self._counters[name]}"
        self._taken.add(candidate)
        return candidate

    def array(self, name: str) -> np.ndarray | None:
        """Value of an initializer, or None where `name` is none."""
        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(with_data(tensor))

    def set_array(self, name: str, value: np.ndarray) -> str:
        """Make `name` an initializer that holds `value`; returns the name."""
        self.initializers[name] = numpy_helper.from_array(np.array(value, order="C"), name)
        self._types.pop(name, None)
        self._taken.add(name)
        return name

    def add(
        self,
        op_type: str,
        inputs: Iterable[str],
        outputs: Iterable[str],
        name: str = "",
        **attributes: Any,
    ) -> NodeProto:
        """Append a node of the default domain and return it."""
        node = helper.make_node(op_type, list(inputs), list(outputs), name=name, **attributes)
        self.nodes.append(node)
        self._taken.update((*node.output, node.name))
        return node

    def remove(self, nodes: Iterable[NodeProto]) -> None:
        """Take nodes out (by identity)."""
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]

    def replace_reads(self, old: str, new: str, but: Iterable[NodeProto] = ()) -> None:
        """Make every node that reads `old` read `new`, except the nodes in `but`."""
        spared = {id(node) for node in but}
        for node in self.nodes:
            if id(node) not in spared:
                _replace_in_node(node, old, new)

    def forget_type(self, name: str) -> None:
        """Drop what the model says of a tensor's type and shape."""
        self._types.pop(name, None)

    def move_type(self, name: str, new_name: str) -> None:
        """What the model says of a tensor's type and shape is true of another one from now on."""
        known = self._types.pop(name, None)
        if known is not None:
            moved = onnx.ValueInfoProto(name=new_name)
            moved.type.CopyFrom(known.type)
            self._types[new_name] = moved

    def value_type(self, name: str) -> onnx.TypeProto | None:
        """What the model says of a tensor's type, or None."""
        for value in (*self.inputs, *self.outputs):
            if value.name == name:
                return value.type
        return self._types[name].type if name in self._types else None

    def remove_unused(self) -> None:
        """Remove nodes whose outputs nobody reads, and initializers nobody reads."""
        made_by = self.producers()
        needed: set[int] = set()
        read = set(self.output_names)
        todo = list(read)
        while todo:
            node = made_by.get(todo.pop())
            if node is None or id(node) in needed:
                continue
            needed.add(id(node))
            new = names_read(node) - read
            read |= new
            todo.extend(new)
        self.nodes = [node for node in self.nodes if id(node) in needed]
        self.initializers = {k: t for k, t in self.initializers.items() if k in read}

    def model(self, *, opset: int, ir_version: int) -> onnx.ModelProto:
        """The edited model, nodes in topological order, names and doc strings only of this graph.

        Metadata of nodes, values, tensors, graph and model are left out. The graph's tensors are
        handed over, so that they are not there twice: it has none afterwards.
        """
        self.remove_unused()
        made = {name for node in self.nodes for name in node.output}
        model = onnx.ModelProto(
            ir_version=ir_version,
            producer_name="amct_pytorch",
            opset_import=[helper.make_opsetid("", opset)],
        )
        # Filled in place: protobuf cannot copy a graph of 2 GiB.
        graph = model.graph
        graph.name = self._source.graph.name or "main_graph"
        for node in topological_order(self.nodes):
            _strip_node(node)
            graph.node.append(node)
        for name in list(self.initializers):
            graph.initializer.append(self.initializers.pop(name))
            _strip(graph.initializer[-1])
        for value in self.inputs:
            graph.input.append(value)
        for value in self.outputs:
            graph.output.append(value)
        for value in self._types.values():
            if value.name in made and value.name not in self.output_names:
                graph.value_info.append(value)
        for value in (*graph.input, *graph.output, *graph.value_info):
            _strip(value)
        return model


def _strip(part: Any) -> None:
    part.ClearField("doc_string")
    if "metadata_props" in part.DESCRIPTOR.fields_by_name:
        part.ClearField("metadata_props")


def _strip_node(node: NodeProto) -> None:
    _strip(node)
    if "overload" in node.DESCRIPTOR.fields_by_name:
        node.ClearField("overload")
    if node.domain in DEFAULT_DOMAINS:
        node.ClearField("domain")
    for graph in subgraphs(node):
        _strip(graph)
        for inner in graph.node:
            _strip_node(inner)
        for part in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            _strip(part)
