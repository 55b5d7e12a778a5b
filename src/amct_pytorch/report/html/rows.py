"""The layers of a ledger as rows of a table, graded by how much they suffered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amct_pytorch.report.html.cells import Cell, cell, number

# Columns that the table has first, where a ledger has them.
FIRST = ("sqnr_db", "drop_db", "cosine", "error", "type", "status")
# Shown in a place of their own.
NOT_COLUMNS = frozenset({"name", "reason", "notes", "input_histogram"})
# A layer that is left as it was has one of these, or a reason.
LEFT = frozenset({"float", "kept", "whole", "dense", "left", "skipped"})


@dataclass(frozen=True)
class Measure:
    """A figure that says how much a layer suffered.

    Attributes:
        key: of the figure.
        label: for the legend.
        unit: behind a number.
        spec: how a number is written.
        bounds: where one grade ends and the next, worse one begins.
        higher_is_better: whether bounds fall.
    """

    key: str
    label: str
    unit: str
    spec: str
    bounds: tuple[float, ...]
    higher_is_better: bool

    def grade(self, value: float) -> int:
        """0 (best) to len(bounds) (worst)."""
        if self.higher_is_better:
            return sum(value < bound for bound in self.bounds)
        return sum(value > bound for bound in self.bounds)


MEASURES = (
    Measure("sqnr_db", "SQNR", " dB", ".1f", (35.0, 25.0, 18.0, 12.0), True),
    Measure("cosine", "cosine", "", ".4f", (0.9998, 0.998, 0.99, 0.97), True),
    Measure("error", "relative error", "", ".3g", (0.02, 0.1, 0.25, 0.5), False),
    Measure("magnitude_kept", "magnitude kept", "", ".1%", (0.95, 0.85, 0.75, 0.65), True),
    Measure("kept_share", "channels kept", "", ".0%", (0.99, 0.75, 0.5, 0.25), True),
)


@dataclass
class Histogram:
    """The histogram of a layer's input.

    Attributes:
        low: lower end.
        high: upper end.
        counts: in equal bins.
        chosen: the range that the integers cover; None: not known.
        clipped: share of the values outside it.
    """

    low: float
    high: float
    counts: list[int]
    chosen: tuple[float, float] | None = None
    clipped: float | None = None


@dataclass
class Row:
    """One layer.

    Attributes:
        name: of it.
        status: as in the ledger.
        left: whether it is as it was.
        reason: why; empty for others.
        notes: of it.
        value: its error by the page's measure; None: not measured, or none.
        exact: whether it was measured and has no error.
        grade: of the error; None without one.
        cells: by column.
        histogram: of its input.
    """

    name: str
    status: str
    left: bool
    reason: str
    notes: list[str]
    value: float | None
    exact: bool
    grade: int | None
    cells: list[Cell] = field(default_factory=list)
    histogram: Histogram | None = None


def with_drops(
    layers: Sequence[Mapping[str, Any]], sources: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    """The layers' figures, and those that follow from them and from who feeds whom."""
    before = _measured_before(layers, sources)
    return [_with_more(layer, before) for layer in layers]


def measure_of(layers: Sequence[Mapping[str, Any]]) -> Measure | None:
    """The first measure that some layer has a figure for."""
    return next((m for m in MEASURES if any(number(x.get(m.key)) for x in layers)), None)


def _measured_before(
    layers: Sequence[Mapping[str, Any]], sources: Mapping[str, list[str]]
) -> dict[str, float]:
    """For each layer, the lowest SQNR of those that feed it, layers without one passed over."""
    own = {layer["name"]: layer.get("sqnr_db") for layer in layers}
    found: dict[str, float] = {}
    # Sources stand in the order in which layers run, so a layer's own are known before it.
    for name, feeding in sources.items():
        values = [
            own.get(other) if number(own.get(other)) else found.get(other) for other in feeding
        ]
        known = [value for value in values if value is not None]
        if known:
            found[name] = min(known)
    return found


def _with_more(layer: Mapping[str, Any], before: Mapping[str, float]) -> dict[str, Any]:
    """A layer's figures, and those that follow from them."""
    found = dict(layer)
    if number(layer.get("sqnr_db")) and layer["name"] in before:
        found["drop_db"] = max(0.0, before[layer["name"]] - layer["sqnr_db"])
    channels = layer.get("channels")
    if isinstance(channels, (list, tuple)) and len(channels) == 2 and channels[0]:
        found["kept_share"] = channels[1] / channels[0]
    return found


def columns_of(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that some layer has a value for, those of `FIRST` first."""
    seen: dict[str, None] = dict.fromkeys(FIRST)
    for layer in layers:
        seen.update(dict.fromkeys(layer))
    return [
        key
        for key in seen
        if key not in NOT_COLUMNS
        and any(
            layer.get(key) not in (None, [], "") and not isinstance(layer.get(key), dict)
            for layer in layers
        )
    ]


def row_of(layer: Mapping[str, Any], measure: Measure | None, keys: Sequence[str]) -> Row:
    """A layer's row."""
    status, reason = str(layer.get("status", "")), layer.get("reason")
    left = status in LEFT or bool(reason)
    value, exact, grade = None, False, None
    if measure is not None and not left:
        found = layer.get(measure.key)
        exact = measure.key == "sqnr_db" and found is None and layer.get("cosine") is not None
        if number(found):
            value = float(found)
            grade = measure.grade(value)
        elif exact:
            grade = 0
    cells = [cell(key, layer.get(key)) for key in keys]
    if exact and "sqnr_db" in keys:
        cells[keys.index("sqnr_db")] = Cell("exact", 999.0)
    notes = [str(note) for note in layer.get("notes") or ()]
    return Row(
        str(layer["name"]) or "(the model)",
        status,
        left,
        str(reason or ""),
        notes,
        value,
        exact,
        grade,
        cells,
        _histogram(layer),
    )


def _histogram(layer: Mapping[str, Any]) -> Histogram | None:
    found = layer.get("input_histogram")
    if not isinstance(found, Mapping) or not found.get("counts"):
        return None
    histogram = Histogram(float(found["low"]), float(found["high"]), list(found["counts"]))
    scale, offset = layer.get("input_scale"), layer.get("input_offset")
    if number(scale) and number(offset):
        bits = layer.get("input_bits") or 8
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        histogram.chosen = ((low - offset) * scale, (high - offset) * scale)
        histogram.clipped = _outside(histogram, histogram.chosen)
    return histogram


def _outside(histogram: Histogram, chosen: tuple[float, float]) -> float:
    """Share of the values outside a range, values spread evenly in their bins."""
    total = sum(histogram.counts)
    width = (histogram.high - histogram.low) / len(histogram.counts)
    if not total or width <= 0:
        return 0.0
    inside = 0.0
    for i, count in enumerate(histogram.counts):
        start = histogram.low + i * width
        share = (min(start + width, chosen[1]) - max(start, chosen[0])) / width
        inside += count * min(max(share, 0.0), 1.0)
    return max(0.0, 1 - inside / total)
