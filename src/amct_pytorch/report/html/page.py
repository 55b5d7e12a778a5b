"""What the page of a ledger shows, worked out from the ledger's JSON.

Ledgers of all flows have the same bones: ``layers`` with ``name``, ``status``, ``reason``,
``notes`` and figures of their own. So nothing here knows a flow: `cells.LABELS` says how a
figure is called and written, `rows.MEASURES` which figure is a layer's error. A flow with new
figures adds a row to a table; figures that are in no table are shown under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amct_pytorch.report.html.cells import Cell, cell, heading, number
from amct_pytorch.report.html.rows import Measure, Row, columns_of, measure_of, row_of, with_drops
from amct_pytorch.report.html.tiles import Tile, tiles_of

# Whole-ledger keys with a place of their own.
NOT_TABLES = frozenset({"layers", "network", "notes"})


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
    layers = with_drops(ledger["layers"], sources)
    measure = measure_of(layers)
    keys = columns_of(layers)
    rows = [row_of(layer, measure, keys) for layer in layers]
    ranking, ranking_of = _ranking(rows, layers, measure)
    return Page(
        title,
        str(ledger.get("flow", "")),
        measure,
        tiles_of(ledger, rows),
        [heading(key) for key in keys],
        rows,
        ranking,
        ranking_of,
        [str(note) for note in ledger.get("notes") or ()],
        _tables(ledger),
    )


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
    if key == "bytes" and number(value):
        return Cell(f"{value / 2**20:.3f} MiB", float(value))
    if key == "seconds" and number(value):
        return Cell(f"{value:.2f} s", float(value))
    return cell(key, value)
