"""What the page of a ledger shows, worked out from the ledger's JSON.

Ledgers of all flows have the same bones: ``layers`` with ``name``, ``status``, ``reason``,
``notes`` and figures of their own. So nothing here knows a flow: `LABELS` says how a figure is
called and written, `MEASURES` which figure is a layer's error. A flow with new figures adds a row
to a table; figures that are in no table are shown under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amct_pytorch.report.ledger import LOST_DB

# Figure of a layer -> (heading, how a number is written).
LABELS: dict[str, tuple[str, str]] = {
    "type": ("type", ""),
    "algorithm": ("algorithm", ""),
    "weights": ("weights", ",d"),
    "inputs": ("inputs", ""),
    "sqnr_db": ("SQNR dB", ".1f"),
    "drop_db": ("drop dB", ".1f"),
    "cosine": ("cosine", ".5f"),
    "error": ("error", ".4g"),
    "other_error": ("error otherwise", ".4g"),
    "sqnr_db_uncorrected": ("SQNR dB before bias correction", ".1f"),
    "bias_corrected": ("bias corrected", ""),
    "parameters": ("parameters", ",d"),
    "parameters_before": ("parameters before", ",d"),
    "parameters_after": ("parameters after", ",d"),
    "flops": ("FLOPs", ",d"),
    "flops_before": ("FLOPs before", ",d"),
    "flops_after": ("FLOPs after", ",d"),
    "bitops": ("bit operations", ",d"),
    "macs": ("multiply-adds a sample", ",d"),
    "channels": ("channels", ",d"),
    "kept": ("kept", ",d"),
    "magnitude_kept": ("magnitude kept", ".1%"),
    "sensitivity": ("sensitivity", ".4g"),
    "weight_bits": ("weight bits", "d"),
    "weight_scales": ("weight scales", "d"),
    "weight_scale_range": ("weight scales from, to", ".3g"),
    "weight_shape": ("weight shape", "d"),
    "output_shape": ("output shape", "d"),
    "input_scale": ("input scale", ".4g"),
    "input_offset": ("offset", "d"),
    "input_range": ("observed from, to", ".4g"),
    "input_bits": ("input bits", "d"),
    "float_bytes": ("bytes before", ",d"),
    "stored_bytes": ("bytes after", ",d"),
    "milliseconds": ("ms", ".2f"),
    "milliseconds_before": ("ms before", ".2f"),
    "milliseconds_after": ("ms after", ".2f"),
    "loss_before": ("loss before", ".4g"),
    "loss_after": ("loss after", ".4g"),
    "seconds": ("seconds", ".2f"),
    "rank_estimate": ("rank wanted", "d"),
    "fused": ("BatchNorm folded in", ""),
}
# Pairs of these are before and after, not from and to.
BEFORE_AFTER = frozenset({"channels", "parameters", "flops", "bitops", "milliseconds"})
# Columns that the table has first, where a ledger has them.
FIRST = ("sqnr_db", "drop_db", "cosine", "error", "type", "status")
# Shown in a place of their own.
NOT_COLUMNS = frozenset({"name", "reason", "notes", "input_histogram"})
# Whole-ledger keys with a place of their own.
NOT_TABLES = frozenset({"layers", "network", "notes"})
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


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        order: what it is sorted by; None: last.
    """

    text: str
    order: float | str | None = None


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


@dataclass
class Tile:
    """One figure of the summary.

    Attributes:
        label: what it is.
        value: how it is now.
        note: how it was before, or what else there is to say.
        bad: whether it is a warning.
    """

    label: str
    value: str
    note: str = ""
    bad: bool = False


@dataclass
class Table:
    """A table of whatever else a ledger holds.

    Attributes:
        title: of it.
        columns: headings.
        rows: cells.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass
class Page:
    """Everything that the page shows."""

    title: str
    flow: str
    measure: Measure | None
    tiles: list[Tile]
    columns: list[str]
    rows: list[Row]
    ranking: list[tuple[str, str, str]]
    ranking_of: str
    notes: list[str]
    tables: list[Table]


def page_of(ledger: Mapping[str, Any], title: str, sources: Mapping[str, list[str]]) -> Page:
    """The page of a ledger's JSON document.

    Args:
        ledger: with ``layers``.
        title: of the page.
        sources: for each layer, those that feed it; may be empty.
    """
    before = _measured_before(ledger["layers"], sources)
    layers = [_with_more(layer, before) for layer in ledger["layers"]]
    measure = next((m for m in MEASURES if any(_figure(x, m.key) for x in layers)), None)
    keys = _columns(layers)
    rows = [_row(layer, measure, keys) for layer in layers]
    ranking, ranking_of = _ranking(rows, layers, measure)
    return Page(
        title,
        str(ledger.get("flow", "")),
        measure,
        _tiles(ledger, rows),
        [heading(key) for key in keys],
        rows,
        ranking,
        ranking_of,
        [str(note) for note in ledger.get("notes") or ()],
        _tables(ledger),
    )


def heading(key: str) -> str:
    """What a figure is called."""
    return LABELS[key][0] if key in LABELS else key.replace("_", " ")


def _measured_before(
    layers: Sequence[Mapping[str, Any]], sources: Mapping[str, list[str]]
) -> dict[str, float]:
    """For each layer, the lowest SQNR of those that feed it, layers without one passed over."""
    own = {layer["name"]: layer.get("sqnr_db") for layer in layers}
    found: dict[str, float] = {}
    # Sources stand in the order in which layers run, so a layer's own are known before it.
    for name, feeding in sources.items():
        values = [
            own.get(other) if _number(own.get(other)) else found.get(other) for other in feeding
        ]
        known = [value for value in values if value is not None]
        if known:
            found[name] = min(known)
    return found


def _with_more(layer: Mapping[str, Any], before: Mapping[str, float]) -> dict[str, Any]:
    """A layer's figures, and those that follow from them."""
    found = dict(layer)
    if _number(layer.get("sqnr_db")) and layer["name"] in before:
        found["drop_db"] = max(0.0, before[layer["name"]] - layer["sqnr_db"])
    channels = layer.get("channels")
    if isinstance(channels, (list, tuple)) and len(channels) == 2 and channels[0]:
        found["kept_share"] = channels[1] / channels[0]
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(layer: Mapping[str, Any], key: str) -> bool:
    return _number(layer.get(key))


def _columns(layers: Sequence[Mapping[str, Any]]) -> list[str]:
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


def _row(layer: Mapping[str, Any], measure: Measure | None, keys: Sequence[str]) -> Row:
    status, reason = str(layer.get("status", "")), layer.get("reason")
    left = status in LEFT or bool(reason)
    value, exact, grade = None, False, None
    if measure is not None and not left:
        found = layer.get(measure.key)
        exact = measure.key == "sqnr_db" and found is None and layer.get("cosine") is not None
        if _number(found):
            value = float(found)  # type: ignore[arg-type]
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


def cell(key: str, value: Any) -> Cell:
    """How a figure is written and sorted."""
    spec = LABELS.get(key, ("", ""))[1]
    if value is None or value == []:
        return Cell("")
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if _number(value):
        return Cell(_written(value, spec), float(value))
    if isinstance(value, (list, tuple)):
        parts = [_written(item, spec) if _number(item) else str(item) for item in value]
        joined = " → ".join(parts) if key in BEFORE_AFTER else ", ".join(parts)
        last = value[-1]
        return Cell(joined, float(last) if _number(last) else joined)
    return Cell(str(value), str(value))


def _written(value: float, spec: str) -> str:
    if value == LOST_DB:
        return "lost"
    if spec in ("d", ",d") and isinstance(value, float):
        spec = ".4g" if value != int(value) else spec
        value = int(value) if spec != ".4g" else value
    if not spec:
        spec = ",d" if isinstance(value, int) else ".4g"
    return format(value, spec)


def _histogram(layer: Mapping[str, Any]) -> Histogram | None:
    found = layer.get("input_histogram")
    if not isinstance(found, Mapping) or not found.get("counts"):
        return None
    histogram = Histogram(float(found["low"]), float(found["high"]), list(found["counts"]))
    scale, offset = layer.get("input_scale"), layer.get("input_offset")
    if _number(scale) and _number(offset):
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


# --- summary -------------------------------------------------------------------------------------


def _tiles(ledger: Mapping[str, Any], rows: Sequence[Row]) -> list[Tile]:
    tiles = []
    changed = [row for row in rows if not row.left]
    kept = len(rows) - len(changed)
    words = sorted({row.status for row in changed if row.status})
    tiles.append(
        Tile(
            f"layers {' or '.join(words) or 'changed'}",
            f"{len(changed)} of {len(rows)}",
            f"{kept} left as they were" if kept else "none left out",
        )
    )
    output = ledger.get("output")
    if isinstance(output, Mapping):
        tiles += _output_tiles(output)
    tiles += _size_tiles(ledger.get("bytes") or {})
    tiles += _before_after_tiles(ledger)
    seconds = ledger.get("seconds")
    if isinstance(seconds, Mapping) and seconds:
        numbers = {name: value for name, value in seconds.items() if _number(value)}
        longest = max(numbers, key=lambda name: numbers[name], default="")
        tiles.append(
            Tile("time", f"{sum(numbers.values()):.1f} s", f"longest: {longest}" if longest else "")
        )
    return tiles


def _output_tiles(output: Mapping[str, Any]) -> list[Tile]:
    sqnr, cosine, top1 = (output.get(k) for k in ("sqnr_db", "cosine", "top1_agreement"))
    tiles = [
        Tile(
            "output SQNR",
            "exact" if sqnr is None else f"{_written(sqnr, '.1f')} dB",
            f"cosine {cosine:.5f}; on calibration data" if _number(cosine) else "",
            bad=_number(sqnr) and sqnr < 10,  # type: ignore[operator]
        )
    ]
    if _number(top1):
        tiles.append(Tile("same best class", f"{top1:.1%}", "on calibration data"))
    return tiles


def _size_tiles(sizes: Mapping[str, Any]) -> list[Tile]:
    if not (_number(sizes.get("float")) and _number(sizes.get("deploy"))) or not sizes["float"]:
        return []
    before, after = float(sizes["float"]), float(sizes["deploy"])
    note = f"float {before / 2**20:.2f} MiB, {after / before:.0%} of it"
    return [Tile("size", f"{after / 2**20:.2f} MiB", note)]


def _before_after_tiles(ledger: Mapping[str, Any]) -> list[Tile]:
    """Totals of the ledger that are pairs of before and after."""
    pairs: dict[str, tuple[float, float]] = {}
    for key in BEFORE_AFTER:
        value = ledger.get(key)
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value)):
            pairs[key] = (value[0], value[1])
    totals = ledger.get("totals") or {}
    for key, value in totals.items():
        name = key.removesuffix("_before")
        other = totals.get(f"{name}_after")
        if name != key and _number(value) and _number(other):
            pairs[name] = (float(value), float(other or 0))
    if _number(totals.get("weights")) and _number(totals.get("kept")):
        pairs["weights"] = (totals["weights"], totals["kept"])
    tiles = []
    for key in sorted(pairs):
        before, after = pairs[key]
        label, spec = LABELS.get(key, (key.replace("_", " "), ""))
        share = f", {after / before:.0%} of it" if before else ""
        note = f"before {_written(before, spec)}{share}"
        tiles.append(Tile(label, _written(after, spec), note))
    return tiles


def comparison_tiles(comparison: Mapping[str, Any]) -> list[Tile]:
    """The summary of what `amct compare --json` printed."""
    tiles = []
    for output in comparison.get("outputs") or ():
        name = output.get("name", "output")
        sqnr = "exact" if output.get("exact") else f"{_written(output['sqnr_db'], '.1f')} dB"
        top1 = output.get("top1_agreement")
        note = f"cosine {output['cosine']:.5f}"
        if _number(top1):
            note += f", same best class {top1:.1%}"
        note += f"; {comparison.get('samples', '?')} samples"
        tiles.append(Tile(f"{name}: float against {_kind(comparison)}", sqnr, note))
    models = comparison.get("models") or {}
    before, after = (models.get(k, {}).get("milliseconds") for k in ("float", "quant"))
    if _number(before) and _number(after):
        tiles.append(
            Tile(
                "latency of one sample",
                f"{after:.1f} ms",
                f"float {before:.1f} ms, {comparison['speed_up']:.2f} times as fast; "
                f"{_kind(comparison)} in {models['quant'].get('runs_in', '?')}",
                bad=comparison["speed_up"] < 0.9,
            )
        )
    return tiles


def _kind(comparison: Mapping[str, Any]) -> str:
    models = comparison.get("models") or {}
    return str(models.get("quant", {}).get("kind", "quantized"))


# --- rankings ------------------------------------------------------------------------------------


def _ranking(
    rows: Sequence[Row], layers: Sequence[Mapping[str, Any]], measure: Measure | None
) -> tuple[list[tuple[str, str, str]], str]:
    """(layer, figure, what else) worst first, and what the figure is."""
    if measure is None:
        return [], ""
    drops = {layer["name"]: layer["drop_db"] for layer in layers if "drop_db" in layer}
    if len(drops) > 1 and measure.key == "sqnr_db":
        worst = sorted((n for n in drops if drops[n] > 0.05), key=lambda name: -drops[name])
        values = {row.name: row.value for row in rows}
        return [
            (name, f"{drops[name]:.1f} dB", f"to {values[name]:.1f} dB")
            for name in worst
            if values.get(name) is not None
        ], "how far SQNR drops below that of the layers before it"
    measured = [row for row in rows if row.value is not None]
    measured.sort(key=lambda row: row.value or 0.0, reverse=not measure.higher_is_better)
    shown = [(r.name, f"{r.value:{measure.spec}}{measure.unit}", "") for r in measured]
    return shown, measure.label


def given_ranking(document: Any) -> list[tuple[str, str, str]]:
    """The ranking that the search for accuracy wrote: [[layer, score], …], worst first.

    Raises:
        ValueError: it is something else.
    """
    try:
        return [(str(name), f"{float(score):.6f}", "") for name, score in document]
    except (TypeError, ValueError) as error:
        raise ValueError("it is no list of [layer, score]") from error


# --- the rest ------------------------------------------------------------------------------------


def _tables(ledger: Mapping[str, Any]) -> list[Table]:
    """Other lists of objects in the ledger (groups, blocks, …), and its flat figures."""
    tables = []
    for key, value in ledger.items():
        if key in NOT_TABLES or not isinstance(value, list) or not value:
            continue
        if not all(isinstance(item, Mapping) for item in value):
            if all(isinstance(item, str) for item in value):
                rows = [[Cell(item, item)] for item in value]
                tables.append(Table(heading(key), [heading(key)], rows))
            continue
        keys = list(dict.fromkeys(k for item in value for k in item))
        rows = [[cell(k, item.get(k)) for k in keys] for item in value]
        tables.append(Table(heading(key), [heading(k) for k in keys], rows))
    facts = []
    for key, value in ledger.items():
        if isinstance(value, Mapping) and key not in NOT_TABLES and key != "output":
            for name, item in value.items():
                if not isinstance(item, (Mapping, list)):
                    facts.append([Cell(f"{heading(key)}: {name}"), _fact(key, item)])
        elif not isinstance(value, (Mapping, list)) and value is not None and key != "flow":
            facts.append([Cell(heading(key)), _fact(key, value)])
    if facts:
        tables.append(Table("Figures", ["figure", "value"], facts))
    return tables


def _fact(key: str, value: Any) -> Cell:
    if key == "bytes" and _number(value):
        return Cell(f"{value / 2**20:.3f} MiB", float(value))
    if key == "seconds" and _number(value):
        return Cell(f"{value:.2f} s", float(value))
    return cell(key, value)
