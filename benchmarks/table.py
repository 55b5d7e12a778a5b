"""The results as Markdown, written between markers of the READMEs here and at the root."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from machine import has_exact_u8s8
from peers import FLOORS, HERE, OURS, PEERS, ROOT, Contender

RESULTS = HERE / "results" / "efficientnet_lite0.json"
ABSENT = "–"
ROLES = {
    "simulated": "simulated in torch",
    "fake_quant": "fake-quant ONNX",
    "deploy": "deploy, `DeploySession`",
    "qdq": "QDQ in ONNX Runtime",
}


def markdown(document: dict) -> str:
    """All tables of one results document."""
    results = document["contenders"]
    parts = [_setting(document), _main_table(results), _floors(results), _ours(results)]
    parts.append(_left_out(results))
    return "\n\n".join(part for part in parts if part)


def write(document: dict) -> None:
    """Put the tables into both READMEs."""
    replace(HERE / "README.md", "results", markdown(document))
    replace(ROOT / "README.md", "measured", short_table(document))


def replace(file: Path, marker: str, text: str) -> None:
    """Replace what stands between the two comments of that name."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, found_begin, rest = file.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{file.name} has no place for the table: {begin} … {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _setting(document: dict) -> str:
    machine = document["machine"]
    flags = machine["int8_instructions"]
    vnni = "" if has_exact_u8s8(flags) else ", no VNNI"
    settings = ", ".join(f"{name}={value}" for name, value in machine["settings"].items())
    return (
        f"CPU: {machine['cpu']} ({', '.join(flags)}{vnni}), {machine['cores']} cores. "
        f"Every process: {settings}. Medians of {document['repeats']} runs in fresh processes, "
        f"the contenders taking turns. Calibration: {document['calibration']}; fidelity on "
        f"{document['heldout_crops']} crops of photos that calibration never saw."
    )


def _main_table(results: dict) -> str:
    header = (
        "contender",
        "logits cosine",
        "SQNR dB",
        "top-1 agreement",
        "top-1",
        "whole call s (CPU s)",
        "CPU, × float pass",
        "peak MB",
        "speed-up in ONNX Runtime",
        "int8 file MB",
    )
    rows = [row for c in [*OURS[:1], *PEERS] if _has(results, c) for row in _rows(c, results)]
    return lines(header, rows)


def _rows(contender: Contender, results: dict) -> Iterator[tuple[str, ...]]:
    """A row for each way to run what the contender made; its costs stand in the first."""
    result = results[contender.name]
    floor = results.get("float-torch", {}).get("phases", {}).get("call", {}).get("cpu_s")
    call = result["phases"]["call"]
    for number, (role, fidelity) in enumerate(result.get("fidelity", {}).items()):
        costs: tuple[str, ...] = ("", "", "")
        if number == 0:
            costs = (
                f"{call['wall_s']:.1f} ({call['cpu_s']:.1f})",
                f"{call['cpu_s'] / floor:.1f}" if floor else ABSENT,
                f"{result['memory']['peak_mb']:.0f}",
            )
        # A file that could not be evaluated has no row of its own; its speed is still known.
        shown = "qdq" if number == 0 and "qdq" not in result["fidelity"] else role
        file_mb = result["file_mb"].get(shown)
        yield (
            f"{contender.label}, {ROLES[role]}",
            f"{fidelity['cosine']:.4f}",
            f"{fidelity['sqnr_db']:.2f}",
            f"{100 * fidelity['agreement']:.1f} %",
            f"{100 * fidelity['top1']:.1f} %",
            *costs,
            _speed_up(result.get("latency")) if shown == "qdq" else ABSENT,
            f"{file_mb:.1f}" if file_mb else ABSENT,
        )


def _speed_up(latency: dict | None) -> str:
    if latency is None:
        return ABSENT
    exact, clipping = latency.get("int8_speed_up"), latency["int8_clipping_speed_up"]
    return f"{f'{exact:.2f}' if exact else ABSENT} ({clipping:.2f})"


def _floors(results: dict) -> str:
    header = ("floor", "wall s", "CPU s", "peak MB")
    rows = []
    for contender in FLOORS:
        if _has(results, contender):
            call = results[contender.name]["phases"]["call"]
            peak = results[contender.name]["memory"]["peak_mb"]
            rows.append(
                (contender.label, f"{call['wall_s']:.2f}", f"{call['cpu_s']:.2f}", f"{peak:.0f}")
            )
    return lines(header, rows)


def _ours(results: dict) -> str:
    """Where our time goes, as ratios to the float pass of the same run, and memory by batches."""
    present = [contender for contender in OURS if _has(results, contender)]
    if not present or not all(_has(results, contender) for contender in FLOORS):
        return ""
    floor = _cpu_seconds(results, "float-torch")
    export = _cpu_seconds(results, "float-export")
    header = ("step", *(f"{c.label}: CPU s, × float pass" for c in present))
    rows = []
    for name in results[present[0].name]["phases"]:
        seconds = [_cpu_seconds(results, c.name, name) for c in present]
        label = "all together" if name == "call" else f"`{name}`"
        rows.append((label, *(f"{s:.2f}, {s / floor:.2f}" for s in seconds)))
    rest = [
        _cpu_seconds(results, c.name) - _cpu_seconds(results, c.name, "deploy_to_qdq") - export
        for c in present
    ]
    rows.append(
        (
            "all but `deploy_to_qdq`, less the export alone",
            *(f"{s:.2f}, {s / floor:.2f}" for s in rest),
        )
    )
    peaks = [f"{results[c.name]['memory']['peak_mb']:.0f} MB" for c in present]
    rows.append(("peak memory", *peaks))
    return lines(header, rows)


def _cpu_seconds(results: dict, name: str, phase: str = "call") -> float:
    seconds: float = results[name]["phases"][phase]["cpu_s"]
    return seconds


def short_table(document: dict) -> str:
    """What stands in the README of the project: fidelity and speed of each int8 result."""
    results = document["contenders"]
    rows = []
    for contender in [*OURS[:1], *PEERS]:
        if _has(results, contender) and "fidelity" in results[contender.name]:
            result = results[contender.name]
            role = "qdq" if "qdq" in result["fidelity"] else "simulated"
            fidelity = result["fidelity"][role]
            rows.append(
                (
                    f"{contender.label}, {ROLES[role]}",
                    f"{fidelity['sqnr_db']:.1f}",
                    f"{100 * fidelity['agreement']:.1f} %",
                    _speed_up(result.get("latency")),
                )
            )
    header = ("EfficientNet-Lite0, int8", "logits SQNR dB", "top-1 agreement", "speed-up")
    return (
        f"{_setting(document)}\n\n{lines(header, rows)}\n\n"
        "Speed-up: float over int8 latency in ONNX Runtime, one image, one thread, with exact "
        "kernels (in brackets: with kernels that clip on this CPU). More, and how it is measured: "
        "[benchmarks/README.md](benchmarks/README.md)."
    )


def _left_out(results: dict) -> str:
    lines = [
        f"- {contender.label}: {results[contender.name]['left_out']}"
        for contender in [*FLOORS, *OURS, *PEERS]
        if "left_out" in results.get(contender.name, {})
    ]
    notes = [
        f"- {contender.label}: {results[contender.name]['note']}"
        for contender in PEERS
        if results.get(contender.name, {}).get("note")
    ]
    parts = []
    if lines:
        parts.append("Left out of this run:\n\n" + "\n".join(lines))
    if notes:
        parts.append("Notes:\n\n" + "\n".join(notes))
    return "\n\n".join(parts)


def _has(results: dict, contender: Contender) -> bool:
    return "phases" in results.get(contender.name, {})


def lines(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    all_rows = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in all_rows)


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text()))
