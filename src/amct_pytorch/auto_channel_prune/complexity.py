"""Bit complexity of a network of which channels go, from a search's records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amct_pytorch.proto import PruneNode, PruneRecord
from amct_pytorch.record.attributes import attribute


class Complexity:
    """Keeps count of every layer's channels while channels go.

    A layer's bit complexity falls with the share of its input channels that is left, and with
    that of its output channels; a depthwise convolution's with its channels, once.

    Args:
        graph_info: see `SearchChannelBase`.
        search_records: see there.

    Attributes:
        whole: complexity of the whole network.
        now: complexity of what is left.
    """

    def __init__(
        self, graph_info: Mapping[str, Mapping[str, Any]], search_records: Sequence[PruneRecord]
    ) -> None:
        self._costs = {name: float(info["bitops"]) for name, info in graph_info.items()}
        # Share of a layer's input and output channels that is left, and what each channel of
        # a record takes from them: by record, then (layer, side, entries per channel / all).
        self._left = {name: [1.0, 1.0] for name in graph_info}
        self._shares: list[list[tuple[str, int, np.ndarray]]] = []
        for record in search_records:
            number = channels_in(record)
            shares = []
            for node, produces in _nodes(record):
                if node.name not in graph_info:
                    continue
                side = 1 if produces or attribute(node, "follows") else 0
                info = graph_info[node.name]
                whole = info["cout"] if side else info["cin"]
                entries = np.bincount(_inside(node), minlength=number)
                shares.append((node.name, side, entries / whole))
            self._shares.append(shares)
        self.whole = sum(self._costs.values())
        self.now = self.whole

    def saving(self, record: int, channels: np.ndarray) -> float:
        """What goes with some channels of a record, of the present complexity."""
        left: dict[str, list[float]] = {}
        for name, side, entries in self._shares[record]:
            left.setdefault(name, list(self._left[name]))[side] -= float(entries[channels].sum())
        return sum(
            self._cost(name, self._left[name]) - self._cost(name, own) for name, own in left.items()
        )

    def remove(self, record: int, channels: np.ndarray, back: bool = False) -> None:
        """Takes channels of a record away.

        Args:
            record: its index.
            channels: those that go.
            back: whether they are put back instead.
        """
        changed = {name for name, _, _ in self._shares[record]}
        before = sum(self._cost(name, self._left[name]) for name in changed)
        sign = 1.0 if back else -1.0
        for name, side, entries in self._shares[record]:
            self._left[name][side] += sign * float(entries[channels].sum())
        self.now += sum(self._cost(name, self._left[name]) for name in changed) - before

    def _cost(self, name: str, left: Sequence[float]) -> float:
        return self._costs[name] * left[0] * left[1]


def _nodes(record: PruneRecord) -> list[tuple[PruneNode, bool]]:
    """The record's nodes that say where the channels are, and whether they make them."""
    nodes = [*((node, True) for node in record.producer), *((n, False) for n in record.consumer)]
    return [(node, made) for node, made in nodes if attribute(node, "channels") is not None]


def _inside(node: PruneNode) -> np.ndarray:
    """The record's channel of each entry of a node that has one."""
    own = np.array(attribute(node, "channels"), dtype=np.int64)
    return own[own >= 0]


def channels_in(record: PruneRecord) -> int:
    """The number of a record's channels."""
    return 1 + max(int(_inside(node).max(initial=-1)) for node in record.producer)
