"""The network of a deploy model, for ledgers that do not hold it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx

from amct_pytorch.errors import AmctError
from amct_pytorch.export.onnx_graph import names_read, topological_order
from amct_pytorch.report.network import Network, Operation, network_of


def network_of_deploy(path: Path, layers: Collection[str]) -> Network | None:
    """Which layers feed which in a deploy model; None where the file does not tell.

    Layers that stayed float have no names in it, so they are not in the picture.

    Args:
        path: the deploy model.
        layers: names of the ledger's layers.
    """
    from amct_pytorch.export.onnx_file import load_onnx

    try:
        graph = load_onnx(path, tensors_stay=True).graph
        nodes = topological_order(graph.node)
    except AmctError:
        return None
    constants = {tensor.name for tensor in graph.initializer}
    known = set(layers)
    operations = []
    for node in nodes:
        inputs = [name for name in sorted(names_read(node)) if name not in constants]
        operations.append(Operation(node.op_type, inputs, list(node.output), _layer(node, known)))
    given = [(value.name, value.name) for value in graph.input if value.name not in constants]
    return network_of(given, operations, [(value.name, value.name) for value in graph.output])


def _layer(node: onnx.NodeProto, known: Collection[str]) -> str | None:
    """The layer that ends with this node."""
    name = str(node.name).removesuffix(".dequant")
    return name if node.op_type == "AscendDequant" and name in known else None
