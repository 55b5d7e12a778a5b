"""Greedy search: channels go in the order of what they cost by what they save."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from amct_pytorch.auto_channel_prune.complexity import Complexity
from amct_pytorch.auto_channel_prune.ladder import Ladder
from amct_pytorch.auto_channel_prune.search_channel import (
    GraphInfo,
    SearchChannelBase,
    SearchTarget,
)
from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.proto import PruneRecord
from amct_pytorch.record.attributes import attribute

# Beyond the target by more than this share, other states are tried: up to so many steps away
# in two records, or in three where there are few. The cheapest of those that are near is taken.
CLOSE = 0.002
NEAR = 0.01
STEPS = 3
FEW = 12


class GreedySearch(SearchChannelBase):
    """Prunes what has the least sensitivity by the bit complexity it saves, over all layers.

    The value density of a knapsack (Dantzig 1957), with what a step saves and what it costs
    (see `ladder`) worked out anew as the network shrinks. Then every step that turns out not to
    be needed is taken back, and where that still is far beyond the target, one step is exchanged
    for others, and states a few steps away are tried.
    """

    def channel_prune_search(
        self,
        graph_info: GraphInfo,
        search_records: Sequence[PruneRecord],
        prune_config: SearchTarget,
    ) -> dict[str, list[int]]:
        """See `SearchChannelBase.channel_prune_search`.

        Raises:
            ArgumentValueError: the target cannot be reached; says what can.
        """
        compress_ratio, ascend_optimized, max_prune_ratio = prune_config
        ladders = [Ladder.of(r, ascend_optimized, max_prune_ratio) for r in search_records]
        complexity = Complexity(graph_info, search_records)
        state = _State(ladders, complexity, complexity.whole / compress_ratio)
        largest = state.largest_ratio()
        if largest < compress_ratio * (1 - 1e-9):
            raise ArgumentValueError(
                f"compress_ratio is {compress_ratio:g}; the largest reachable is {largest:.4g} "
                f"(max_prune_ratio {max_prune_ratio:g}, ascend_optimized "
                f"{str(ascend_optimized).lower()})"
            )
        state.search()
        masks: dict[str, list[int]] = {}
        for index, record in enumerate(search_records):
            gone = state.gone(index)
            for node in record.producer:
                own = np.array(attribute(node, "channels"))
                masks[node.name] = np.where((own >= 0) & gone[own], 0, 1).tolist()
        return masks


def largest_ratio(
    graph_info: GraphInfo,
    search_records: Sequence[PruneRecord],
    ascend_optimized: bool,
    max_prune_ratio: float,
) -> float:
    """Whole complexity over the least that can be left of it, whatever the sensitivities."""
    ladders = [
        Ladder.of(record, ascend_optimized, max_prune_ratio, rated=False)
        for record in search_records
    ]
    complexity = Complexity(graph_info, search_records)
    return _State(ladders, complexity, complexity.whole).largest_ratio()


class _State:
    """How far each ladder has been gone up.

    Args:
        ladders: one for each record.
        complexity: of the network.
        target: complexity to come down to.
    """

    def __init__(self, ladders: list[Ladder], complexity: Complexity, target: float) -> None:
        self._ladders = ladders
        self._complexity = complexity
        # Rounding of sums must not cost a step.
        self._target = target * (1 + 1e-9)
        self._at = [0] * len(ladders)

    def gone(self, index: int) -> np.ndarray:
        """Whether each channel of a record goes."""
        ladder = self._ladders[index]
        gone = np.zeros(len(ladder.sensitivity), dtype=bool)
        for step in ladder.steps[: self._at[index]]:
            gone[step] = True
        return gone

    def largest_ratio(self) -> float:
        """Whole complexity over that with all steps gone."""
        start = list(self._at)
        for index, ladder in enumerate(self._ladders):
            while self._at[index] < len(ladder.steps):
                self._go(index)
        ratio = self._complexity.whole / max(self._complexity.now, 1e-300)
        for index, at in enumerate(start):
            self._move([(index, at - self._at[index])])
        return ratio

    def search(self) -> None:
        """Goes up until the target is reached, and no further than needed."""
        self._climb(set())
        self._exchange()
        self._look_around()
        self._take_back()

    def _climb(self, without: set[int]) -> None:
        """Goes up by the least density until the target is reached; takes back what it need not.

        Args:
            without: records that stay where they are.
        """
        queue = [(self._density(index), index) for index in self._open() if index not in without]
        heapq.heapify(queue)
        while queue and self._complexity.now > self._target:
            _, index = heapq.heappop(queue)
            # The network has shrunk since: what the step saves has too.
            density = self._density(index)
            if queue and density > queue[0][0]:
                heapq.heappush(queue, (density, index))
                continue
            self._go(index)
            if self._at[index] < len(self._ladders[index].steps):
                heapq.heappush(queue, (self._density(index), index))
        self._take_back()

    def _exchange(self) -> None:
        """Gives one step of a record for steps of others where that comes closer."""
        if self._beyond() <= CLOSE:
            return
        start = list(self._at)
        found = [(self._rank(start), start)]
        for index, at in enumerate(start):
            if at:
                self._restore(start)
                self._return(index)
                self._climb({index})
                if self._beyond() >= 0:
                    found.append((self._rank(start), list(self._at)))
        self._restore(min(found)[1])

    def _look_around(self) -> None:
        """Moves a few records a few steps where that comes closer to the target."""
        if self._beyond() <= CLOSE:
            return
        start = list(self._at)
        best = (self._rank(start), start)
        together = min(3 if len(self._ladders) <= FEW else 2, len(self._ladders))
        for indices in itertools.combinations(range(len(self._ladders)), together):
            for deltas in itertools.product(*(self._moves(index) for index in indices)):
                moves = tuple(zip(indices, deltas, strict=True))
                self._move(moves)
                if self._beyond() >= 0:
                    best = min(best, (self._rank(start), list(self._at)))
                self._move([(index, -delta) for index, delta in moves])
        self._restore(best[1])

    def _rank(self, start: list[int]) -> tuple[bool, float, float]:
        """The smaller the better: of states near the target the cheapest, of others the closest.

        Args:
            start: the state that costs are counted from.
        """
        cost = sum(self._cost(i, *ends) for i, ends in enumerate(zip(start, self._at, strict=True)))
        beyond = self._beyond()
        return (False, cost, beyond) if beyond <= NEAR else (True, beyond, cost)

    def _cost(self, index: int, low: int, high: int) -> float:
        """Costs between two states of a record; negative where they are got back."""
        ladder = self._ladders[index]
        if low > high:
            return -self._cost(index, high, low)
        return sum(ladder.costs[low:high])

    def _restore(self, state: list[int]) -> None:
        self._move([(i, to - at) for i, (at, to) in enumerate(zip(self._at, state, strict=True))])

    def _moves(self, index: int) -> range:
        """How many steps a record can go down (negative) or up, a few at most."""
        at, number = self._at[index], len(self._ladders[index].steps)
        return range(-min(at, STEPS), min(number - at, STEPS) + 1)

    def _move(self, moves: Iterable[tuple[int, int]]) -> None:
        for index, delta in moves:
            for _ in range(abs(delta)):
                if delta > 0:
                    self._go(index)
                else:
                    self._return(index)

    def _take_back(self) -> None:
        """Takes back, the costliest first, each step that the target does not need."""
        while True:
            needless = [
                (self._ladders[i].costs[at - 1], i)
                for i, at in enumerate(self._at)
                if at and self._now_without(i) <= self._target
            ]
            if not needless:
                return
            self._return(max(needless)[1])

    def _open(self) -> list[int]:
        return [i for i, ladder in enumerate(self._ladders) if self._at[i] < len(ladder.steps)]

    def _density(self, index: int) -> float:
        ladder, at = self._ladders[index], self._at[index]
        saving = self._complexity.saving(index, ladder.steps[at])
        return ladder.costs[at] / saving if saving > 0 else float("inf")

    def _now_without(self, index: int) -> float:
        self._return(index)
        now = self._complexity.now
        self._go(index)
        return now

    def _beyond(self) -> float:
        """How far the ratio is beyond the one asked for, as a share; negative: not there yet."""
        return self._target / max(self._complexity.now, 1e-300) - 1

    def _go(self, index: int) -> None:
        self._complexity.remove(index, self._ladders[index].steps[self._at[index]])
        self._at[index] += 1

    def _return(self, index: int) -> None:
        self._at[index] -= 1
        self._complexity.remove(index, self._ladders[index].steps[self._at[index]], back=True)
