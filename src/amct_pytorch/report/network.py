"""The network of a ledger: which layers feed which, what joins in between left out or named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# More nodes than this are no picture any more, and no small file.
MOST_NODES = 4000


@dataclass
class NetworkNode:
    """One node of the drawing.

    Attributes:
        kind: ``input``, ``layer``, ``join`` (an operation on several tensors) or ``output``.
        name: of the layer, the input or the output; of a join, its operation.
    """

    kind: str
    name: str


@dataclass
class Network:
    """Layers, and what flows from one to the next.

    Operations on one tensor (activations, pools, reshapes) are passed over.

    Attributes:
        nodes: in the order in which they run.
        edges: pairs of numbers of nodes, from and to.
    """

    nodes: list[NetworkNode] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)

    def sources(self) -> dict[str, list[str]]:
        """For each layer, the layers whose outputs reach it without another layer between."""
        before: dict[int, list[int]] = {}
        for start, end in self.edges:
            before.setdefault(end, []).append(start)
        # Nodes stand in the order in which they run, so sources are known before their readers.
        behind: list[set[str]] = []
        found = {}
        for number, node in enumerate(self.nodes):
            reaching: set[str] = set().union(*(behind[i] for i in before.get(number, ())))
            if node.kind == "layer":
                found[node.name] = sorted(reaching)
                reaching = {node.name}
            behind.append(reaching)
        return found


@dataclass(frozen=True)
class Operation:
    """One operation of a run.

    Attributes:
        name: of its kind, for a join.
        inputs: what it reads.
        outputs: what it makes.
        layer: the layer whose call it is, or None.
    """

    name: str
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    layer: str | None = None


def network_of(
    inputs: Iterable[tuple[str, Any]],
    operations: Iterable[Operation],
    outputs: Iterable[tuple[str, Any]],
) -> Network | None:
    """The network of a run.

    Args:
        inputs: name and value of each input.
        operations: in the order in which they ran; values may be anything that can be a key.
        outputs: name and value of each output.

    Returns:
        None where there would be more than `MOST_NODES` nodes.
    """
    network = Network()
    origins: dict[Any, frozenset[int]] = {}

    def add(kind: str, name: str, sources: Iterable[int]) -> frozenset[int]:
        number = len(network.nodes)
        network.nodes.append(NetworkNode(kind, name))
        network.edges += [(source, number) for source in sorted(sources)]
        return frozenset({number})

    for name, value in inputs:
        origins[value] = add("input", name, ())
    for operation in operations:
        sources = frozenset().union(*(origins.get(v, frozenset()) for v in operation.inputs))
        if operation.layer is not None:
            sources = add("layer", operation.layer, sources)
        elif len(sources) > 1:
            sources = add("join", operation.name, sources)
        for value in operation.outputs:
            origins[value] = sources
        if len(network.nodes) > MOST_NODES:
            return None
    for name, value in outputs:
        add("output", name, origins.get(value, frozenset()))
    return _leading_to_layers(network)


def _leading_to_layers(network: Network) -> Network:
    """Without joins and inputs that nothing shown depends on."""
    before: dict[int, list[int]] = {}
    for start, end in network.edges:
        before.setdefault(end, []).append(start)
    needed: set[int] = set()
    todo = [i for i, node in enumerate(network.nodes) if node.kind in ("layer", "output")]
    while todo:
        number = todo.pop()
        if number not in needed:
            needed.add(number)
            todo += before.get(number, [])
    numbers = {old: new for new, old in enumerate(sorted(needed))}
    return Network(
        [network.nodes[old] for old in numbers],
        [(numbers[a], numbers[b]) for a, b in network.edges if a in numbers and b in numbers],
    )
