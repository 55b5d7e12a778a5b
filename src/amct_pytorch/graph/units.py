"""Units, a layer with its BatchNorm and activation, and the chains that they form."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from amct_pytorch.graph.activations import FUNCTIONS
from amct_pytorch.graph.trace import OpCall, Trace

ACTIVATIONS = frozenset(FUNCTIONS) | {"softmax", "log_softmax"}


class Units:
    """The units of a traced run.

    Args:
        trace: the run.
        calls: the one call of each layer, by name.
    """

    def __init__(self, trace: Trace, calls: Mapping[str, OpCall]) -> None:
        self._trace = trace
        self._calls = calls
        self._readers: dict[int, list[OpCall]] = {}
        for op in trace.ops:
            for value in dict.fromkeys(op.inputs):
                self._readers.setdefault(value, []).append(op)

    def end(self, layer: str) -> int:
        """The value that leaves the layer's unit."""
        value = self._calls[layer].outputs[0]
        for functions in ({"batch_norm"}, ACTIVATIONS):
            reader = self._only_reader(value)
            if reader is not None and reader.function.rstrip("_") in functions:
                value = reader.outputs[0]
        return value

    def chains(self, layers: Collection[str]) -> list[list[str]]:
        """Cascades of units: each but the first reads only what the one before it made.

        Args:
            layers: those that may stand in one.

        Returns:
            Every one of `layers` in one chain, in the order in which they ran.
        """
        following = {name: self._next(name, layers) for name in layers}
        seconds = set(following.values())
        ordered = sorted(layers, key=lambda name: self._calls[name].index)
        return [list(_follow(name, following)) for name in ordered if name not in seconds]

    def _next(self, layer: str, layers: Collection[str]) -> str | None:
        """The layer of the only unit that reads what leaves this layer's unit."""
        value = self.end(layer)
        while True:
            reader = self._only_reader(value)
            if reader is None:
                return None
            inside = [scope for scope in reader.scopes if scope in layers and scope != layer]
            if inside:
                return inside[0]
            moving = [v for v in reader.inputs if v in self._trace.from_input]
            if len(moving) > 1 or len(reader.outputs) > 1:
                return None
            value = reader.outputs[0]

    def _only_reader(self, value: int) -> OpCall | None:
        readers = self._readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self._trace.outputs else None


def _follow(name: str | None, following: Mapping[str, str | None]) -> Iterator[str]:
    while name is not None:
        yield name
        name = following[name]
