"""The summary on top of the page: one figure a tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amct_pytorch.report.html.cells import BEFORE_AFTER, LABELS, number, written
from amct_pytorch.report.html.rows import Row


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


def tiles_of(ledger: Mapping[str, Any], rows: Sequence[Row]) -> list[Tile]:
    """The summary of a ledger."""
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
        numbers = {name: value for name, value in seconds.items() if number(value)}
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
            "exact" if sqnr is None else f"{written(sqnr, '.1f')} dB",
            f"cosine {cosine:.5f}; on calibration data" if number(cosine) else "",
            bad=number(sqnr) and sqnr < 10,
        )
    ]
    if number(top1):
        tiles.append(Tile("same best class", f"{top1:.1%}", "on calibration data"))
    return tiles


def _size_tiles(sizes: Mapping[str, Any]) -> list[Tile]:
    if not (number(sizes.get("float")) and number(sizes.get("deploy"))) or not sizes["float"]:
        return []
    before, after = float(sizes["float"]), float(sizes["deploy"])
    note = f"float {before / 2**20:.2f} MiB, {after / before:.0%} of it"
    return [Tile("size", f"{after / 2**20:.2f} MiB", note)]


def _before_after_tiles(ledger: Mapping[str, Any]) -> list[Tile]:
    """Totals of the ledger that are pairs of before and after."""
    pairs: dict[str, tuple[float, float]] = {}
    for key in BEFORE_AFTER:
        value = ledger.get(key)
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(number, value)):
            pairs[key] = (value[0], value[1])
    totals = ledger.get("totals") or {}
    for key, value in totals.items():
        name = key.removesuffix("_before")
        other = totals.get(f"{name}_after")
        if name != key and number(value) and number(other):
            pairs[name] = (float(value), float(other or 0))
    if number(totals.get("weights")) and number(totals.get("kept")):
        pairs["weights"] = (totals["weights"], totals["kept"])
    tiles = []
    for key in sorted(pairs):
        before, after = pairs[key]
        label, spec = LABELS.get(key, (key.replace("_", " "), ""))
        share = f", {after / before:.0%} of it" if before else ""
        note = f"before {written(before, spec)}{share}"
        tiles.append(Tile(label, written(after, spec), note))
    return tiles


def comparison_tiles(comparison: Mapping[str, Any]) -> list[Tile]:
    """The summary of what `amct compare --json` printed."""
    tiles = []
    for output in comparison.get("outputs") or ():
        name = output.get("name", "output")
        sqnr = "exact" if output.get("exact") else f"{written(output['sqnr_db'], '.1f')} dB"
        top1 = output.get("top1_agreement")
        note = f"cosine {output['cosine']:.5f}"
        if number(top1):
            note += f", same best class {top1:.1%}"
        note += f"; {comparison.get('samples', '?')} samples"
        tiles.append(Tile(f"{name}: float against {_kind(comparison)}", sqnr, note))
    models = comparison.get("models") or {}
    before, after = (models.get(k, {}).get("milliseconds") for k in ("float", "quant"))
    if number(before) and number(after):
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
