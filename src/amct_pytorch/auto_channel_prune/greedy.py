"""Greedy search: channels go in the order of what they cost by what they save."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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

# Beyond the target by more than this share, other last steps are tried.
CLOSE = 0.005


class GreedySearch(SearchChannelBase):
    """Prunes what has the least sensitivity by the bit complexity it saves, over all layers.

    The value density of a knapsack (Dantzig 1957), with what a step saves worked out anew as
    the network shrinks. Where the step that reaches the target goes far beyond it, other last
    steps are tried, one or two of them, and the one closest to the target is taken; then every
    step that turns out not to be needed is taken back.
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
            while self._at[index] > at:
                self._return(index)
        return ratio

    def search(self) -> None:
        """Goes up until the target is reached, and no further than needed."""
        queue = [(density, index) for index in self._open() for density in [self._density(index)]]
        heapq.heapify(queue)
        while queue and self._complexity.now > self._target:
            _, index = heapq.heappop(queue)
            # The network has shrunk since: what the step saves has too.
            density = self._density(index)
            if queue and density > queue[0][0]:
                heapq.heappush(queue, (density, index))
                continue
            if self._now_after(index) <= self._target:
                for last in self._best_end(index):
                    self._go(last)
                break
            self._go(index)
            if self._at[index] < len(self._ladders[index].steps):
                heapq.heappush(queue, (self._density(index), index))
        self._take_back()

    def _best_end(self, greedy: int) -> tuple[int, ...]:
        """The last step, or the last two, by record: the least costly that come close.

        Args:
            greedy: the step that the density asks for, which reaches the target.
        """
        if self._beyond(self._now_after(greedy)) <= CLOSE:
            return (greedy,)
        ends = list(self._ends())
        close = [end for end in ends if end[0] <= CLOSE]
        if close:
            return min(close, key=lambda end: end[1])[2]
        return min(ends, key=lambda end: (end[0], end[1]))[2]

    def _ends(self) -> list[tuple[float, float, tuple[int, ...]]]:
        """How far beyond the target, at what cost, by which steps."""
        found = []
        for first in self._open():
            cost = self._ladders[first].cost(self._at[first])
            now = self._now_after(first)
            if now <= self._target:
                found.append((self._beyond(now), cost, (first,)))
                continue
            self._go(first)
            for second in self._open():
                after = self._now_after(second)
                if after <= self._target:
                    more = self._ladders[second].cost(self._at[second])
                    found.append((self._beyond(after), cost + more, (first, second)))
            self._return(first)
        return found

    def _take_back(self) -> None:
        """Takes back, the costliest first, each step that the target does not need."""
        while True:
            needless = [
                (self._ladders[i].cost(at - 1), i)
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
        return ladder.cost(at) / saving if saving > 0 else float("inf")

    def _now_after(self, index: int) -> float:
        step = self._ladders[index].steps[self._at[index]]
        return self._complexity.now - self._complexity.saving(index, step)

    def _now_without(self, index: int) -> float:
        self._return(index)
        now = self._complexity.now
        self._go(index)
        return now

    def _beyond(self, now: float) -> float:
        """How far the ratio is beyond the one asked for, as a share."""
        return self._target / max(now, 1e-300) - 1

    def _go(self, index: int) -> None:
        self._complexity.remove(index, self._ladders[index].steps[self._at[index]])
        self._at[index] += 1

    def _return(self, index: int) -> None:
        self._at[index] -= 1
        self._complexity.remove(index, self._ladders[index].steps[self._at[index]], back=True)
