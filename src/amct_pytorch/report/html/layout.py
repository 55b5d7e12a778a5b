"""Where the nodes of a network are drawn: in layers from top to bottom.

The usual steps of layered drawing (Sugiyama, Tagawa, Toda, "Methods for visual understanding of
hierarchical system structures", 1981): ranks by the longest path, a place for each edge in every
rank that it crosses, orders within ranks by the mean place of neighbours, then positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SWEEPS = 8
# A node that only carries an edge through a rank is this much narrower.
THREAD = 0.22


@dataclass(frozen=True)
class Drawing:
    """Positions, in units of one node.

    Attributes:
        places: (x, rank) of each node; x counts node widths, rank rows.
        paths: for each edge, the places that it passes, its ends included.
        width: number of node widths.
        height: number of ranks.
    """

    places: list[tuple[float, int]]
    paths: list[list[tuple[float, int]]]
    width: float
    height: int


def drawn(number: int, edges: Sequence[tuple[int, int]]) -> Drawing:
    """Positions for a graph without cycles.

    Args:
        number: of nodes.
        edges: pairs (from, to) with from < to: nodes stand in an order in which they can run.
    """
    ranks = [0] * number
    for start, end in sorted(edges, key=lambda edge: edge[1]):
        ranks[end] = max(ranks[end], ranks[start] + 1)
    # Threads: nodes in between, so that every link goes from one rank to the next.
    all_ranks = list(ranks)
    chains: list[list[int]] = []
    for start, end in edges:
        chain = [start]
        for rank in range(ranks[start] + 1, ranks[end]):
            chain.append(len(all_ranks))
            all_ranks.append(rank)
        chains.append([*chain, end])
    rows: list[list[int]] = [[] for _ in range(max(all_ranks, default=-1) + 1)]
    for node, rank in enumerate(all_ranks):
        rows[rank].append(node)
    above: list[list[int]] = [[] for _ in all_ranks]
    below: list[list[int]] = [[] for _ in all_ranks]
    for chain in chains:
        for a, b in itertools.pairwise(chain):
            above[b].append(a)
            below[a].append(b)
    _order(rows, above, below)
    widths = [1.0 if node < number else THREAD for node in range(len(all_ranks))]
    x = _positions(rows, above, below, widths)
    paths = [[(x[node], all_ranks[node]) for node in chain] for chain in chains]
    return Drawing(
        [(x[node], ranks[node]) for node in range(number)],
        paths,
        max((x[i] + widths[i] / 2 for i in range(len(x))), default=1.0),
        len(rows),
    )


def _order(rows: list[list[int]], above: list[list[int]], below: list[list[int]]) -> None:
    """Orders each rank by the mean place of its neighbours, down and up by turns."""
    place = {node: float(i) for row in rows for i, node in enumerate(row)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else rows[::-1]:
            centre = {
                node: sum(place[other] for other in neighbours[node]) / len(neighbours[node])
                if neighbours[node]
                else place[node]
                for node in row
            }
            row.sort(key=lambda node: centre[node])
            for i, node in enumerate(row):
                place[node] = float(i)


def _positions(
    rows: list[list[int]],
    above: list[list[int]],
    below: list[list[int]],
    widths: list[float],
) -> list[float]:
    """x of every node: near its neighbours, apart from those beside it."""
    x = [0.0] * len(widths)
    for row in rows:
        end = 0.0
        for node in row:
            x[node] = end + widths[node] / 2
            end += widths[node]
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else rows[::-1]:
            wanted = [
                sum(x[other] for other in neighbours[node]) / len(neighbours[node])
                if neighbours[node]
                else x[node]
                for node in row
            ]
            for node, value in zip(row, _apart(wanted, [widths[n] for n in row]), strict=True):
                x[node] = value
    left = min((x[i] - widths[i] / 2 for i in range(len(x))), default=0.0)
    return [value - left for value in x]


def _apart(wanted: list[float], widths: list[float]) -> list[float]:
    """Places nearest to those wanted, in the same order, that do not overlap.

    Least squares under an order is found by pooling neighbours that violate it.
    """
    offsets, total = [], 0.0
    for width in widths:
        offsets.append(total + width / 2)
        total += width
    blocks: list[tuple[float, int]] = []  # (sum of what is wanted less offset, members)
    for value, offset in zip(wanted, offsets, strict=True):
        blocks.append((value - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((last[0] + before[0], last[1] + before[1]))
    means = [share / members for share, members in blocks for _ in range(members)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
