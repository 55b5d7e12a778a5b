"""SVG of a network and of histograms; colours come from the page's style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amct_pytorch.report.html.layout import Drawing, drawn
from amct_pytorch.report.html.rows import Histogram, Row
from amct_pytorch.report.network import Network

NODE_WIDTH, NODE_HEIGHT = 168, 40
GAP_X, GAP_Y = 16, 22
# Text that fits into a node.
LETTERS = 23
MARGIN = 10


@dataclass(frozen=True)
class DrawnNode:
    """One node, ready for the template.

    Attributes:
        kind: of it.
        x: left edge.
        y: upper edge.
        width: of its box.
        name: shown, shortened.
        text: below the name.
        title: said in full.
        grade: of a layer's error, or ``left``, or ``none``.
        anchor: id of the row it leads to; empty for none.
    """

    kind: str
    x: float
    y: float
    width: float
    name: str
    text: str
    title: str
    grade: str
    anchor: str


@dataclass(frozen=True)
class DrawnNetwork:
    """A network, ready for the template."""

    width: float
    height: float
    nodes: list[DrawnNode]
    edges: list[str]


def shortened(name: str, letters: int = LETTERS) -> str:
    """A name with its middle left out where it is too long; its end tells layers apart."""
    if len(name) <= letters:
        return name
    tail = letters * 2 // 3
    return f"{name[: letters - tail - 1]}…{name[-tail:]}"


def draw_network(network: Network, rows: Sequence[Row], figure: Mapping[str, str]) -> DrawnNetwork:
    """A network with each layer's error.

    Args:
        network: of the ledger.
        rows: of the table.
        figure: what is written below each layer's name.
    """
    places = drawn(len(network.nodes), network.edges)
    by_name = {row.name: (i, row) for i, row in enumerate(rows)}
    nodes = []
    for node, (x, rank) in zip(network.nodes, places.places, strict=True):
        centre, y = _x(x), MARGIN + rank * (NODE_HEIGHT + GAP_Y)
        number, row = by_name.get(node.name, (-1, None)) if node.kind == "layer" else (-1, None)
        width = NODE_WIDTH if node.kind == "layer" else 78
        text, grade = figure.get(node.name, "") if row else "", "none"
        if row is not None:
            grade = "left" if row.left else "none" if row.grade is None else str(row.grade)
        title = node.name if not text else f"{node.name}: {text}"
        if row is not None and row.reason:
            title += f" ({row.reason})"
        letters = LETTERS if node.kind == "layer" else 11
        nodes.append(
            DrawnNode(
                node.kind,
                round(centre - width / 2, 1),
                y,
                width,
                shortened(node.name, letters),
                text,
                title,
                grade,
                f"layer-{number}" if number >= 0 else "",
            )
        )
    return DrawnNetwork(
        round(2 * MARGIN + places.width * (NODE_WIDTH + GAP_X), 1),
        2 * MARGIN + places.height * (NODE_HEIGHT + GAP_Y) - GAP_Y,
        nodes,
        _edges(places),
    )


def _x(x: float) -> float:
    return MARGIN + x * (NODE_WIDTH + GAP_X)


def _edges(places: Drawing) -> list[str]:
    """Path data of each edge: straight through ranks, bent between them."""
    paths = []
    for points in places.paths:
        parts = []
        for i, (x, rank) in enumerate(points):
            top = MARGIN + rank * (NODE_HEIGHT + GAP_Y)
            if i == 0:
                parts.append(f"M{_x(x):.1f} {top + NODE_HEIGHT}")
                continue
            before = _x(points[i - 1][0])
            bend = top - GAP_Y / 2
            parts.append(f"C{before:.1f} {bend} {_x(x):.1f} {bend} {_x(x):.1f} {top}")
            if i < len(points) - 1:
                parts.append(f"V{top + NODE_HEIGHT}")
        paths.append("".join(parts))
    return paths


HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 240, 84


@dataclass(frozen=True)
class DrawnHistogram:
    """A histogram, ready for the template.

    Attributes:
        bars: path data.
        chosen: left edge and width of the range that integers cover, within the drawing.
        label: what it shows, in words.
    """

    bars: str
    chosen: tuple[float, float] | None
    label: str


def draw_histogram(histogram: Histogram, name: str) -> DrawnHistogram:
    """A histogram with its chosen range; heights by the square root of counts, to see tails."""
    low, high = histogram.low, histogram.high
    if histogram.chosen is not None:
        low, high = min(low, histogram.chosen[0]), max(high, histogram.chosen[1])
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return (value - low) / span * HISTOGRAM_WIDTH

    largest = max(max(histogram.counts), 1) ** 0.5
    step = (histogram.high - histogram.low) / len(histogram.counts)
    bars = []
    for i, count in enumerate(histogram.counts):
        if count:
            left = place(histogram.low + i * step)
            width = max(place(histogram.low + (i + 1) * step) - left, 0.8)
            height = max(HISTOGRAM_HEIGHT * count**0.5 / largest, 0.8)
            bars.append(f"M{left:.1f} {HISTOGRAM_HEIGHT}v{-height:.1f}h{width:.1f}v{height:.1f}z")
    label = f"input of {name}: observed {histogram.low:.4g} to {histogram.high:.4g}"
    chosen = None
    if histogram.chosen is not None:
        left, right = map(place, histogram.chosen)
        chosen = (round(left, 1), round(right - left, 1))
        label += f", integers cover {histogram.chosen[0]:.4g} to {histogram.chosen[1]:.4g}"
    if histogram.clipped is not None:
        label += f", {clipped_text(histogram.clipped)}"
    return DrawnHistogram("".join(bars), chosen, label)


def clipped_text(share: float) -> str:
    """How much lies outside the chosen range, in words."""
    if share < 5e-6:
        return "nothing clipped"
    return f"{share:.3%} clipped" if share < 0.001 else f"{share:.2%} clipped"
