"""One accuracy table: every feature on the real models that it is for.

    python benchmarks/accuracy.py                    # what is not measured yet, hours in all
    python benchmarks/accuracy.py --only ptq-brain qat8-fashion
    python benchmarks/accuracy.py --list
    python benchmarks/accuracy.py --table            # measures nothing, writes the table again

Each row runs in a process of its own and drives an example or another benchmark. A finished row is
kept in `results/accuracy.json` at once, so an interrupted run goes on behind it; `--again` measures
rows that are there. The table stands in docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accuracy_rows import ROWS
from machine import SETTINGS, describe
from peers import HERE, ROOT
from table import ABSENT, lines, replace

RESULTS = HERE / "results" / "accuracy.json"
PAGE = ROOT / "docs" / "accuracy.md"
# Lower is better, and differences are told in percent of the float figure.
RELATIVE = ("perplexity",)
DIGITS = {"Pearson": 4, "Dice": 4}


def kept() -> dict[str, Any]:
    """The rows that have been measured, by name."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(name: str, row: dict[str, Any]) -> None:
    """Adds a row to the results, whole or not at all."""
    document = {**kept(), name: row}
    RESULTS.parent.mkdir(exist_ok=True)
    beside = RESULTS.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    beside.replace(RESULTS)


def measure_apart(name: str) -> dict[str, Any] | None:
    """Measures a row in a fresh process; None if that failed."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, str(HERE / "accuracy.py"), "--measure", name, str(figures)]
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **SETTINGS}, check=False)
        if ended.returncode or not figures.exists():
            return None
        found: dict[str, Any] = json.loads(figures.read_text())
        return found


def measure_here(name: str, file: Path) -> None:
    """Measures a row in this process and writes its figures to a file."""
    sys.path.insert(0, str(ROOT / "examples"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (row,) = (row for row in ROWS if row.name == name)
    with tempfile.TemporaryDirectory() as folder:
        found = asdict(row.measure(Path(folder)))
    seconds = sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    cpu = describe()["cpu"]
    file.write_text(json.dumps({**found, "cpu_s": round(seconds), "cpu": cpu}))


def markdown(found: dict[str, Any]) -> str:
    """The table of all rows; those that are not measured have no figures."""
    header = ("feature", "model", "metric", "float", "compressed", "difference", "size", "also")
    rows = [
        (row.feature, row.model, row.metric, *_cells(row.metric, found.get(row.name)))
        for row in ROWS
    ]
    missing = sum(row.name not in found for row in ROWS)
    text = lines(header, rows)
    return f"{text}\n\n{missing} of {len(ROWS)} rows are not measured yet." if missing else text


def _cells(metric: str, row: dict[str, Any] | None) -> tuple[str, ...]:
    if row is None:
        return (ABSENT,) * 5
    digits = DIGITS.get(metric, 2)
    own, compressed = row["float"], row["compressed"]
    difference = ABSENT
    if own is not None:
        difference = f"{compressed - own:+.{digits}f}"
        if metric in RELATIVE:
            difference = f"{100 * (compressed / own - 1):+.1f} %"
    return (
        ABSENT if own is None else f"{own:.{digits}f}",
        f"{compressed:.{digits}f}",
        difference,
        ABSENT if row["size"] is None else f"{row['size']:.3f}",
        row["note"],
    )


def run(names: Sequence[str], again: bool) -> int:
    """Measures rows one after the other; the number of those that failed."""
    failed = []
    for number, name in enumerate(names, start=1):
        if name in kept() and not again:
            print(f"[{number}/{len(names)}] {name}: kept")
            continue
        print(f"[{number}/{len(names)}] {name}", flush=True)
        row = measure_apart(name)
        if row is None:
            failed.append(name)
            continue
        keep(name, row)
        replace(PAGE, "accuracy", markdown(kept()))
        print(f"{name}: float {row['float']}, compressed {row['compressed']}", flush=True)
    if failed:
        print(f"failed, and not kept: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def main() -> int:
    """Measures what is asked for and rewrites the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows")
    parser.add_argument("--again", action="store_true", help="also rows that are kept")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_here(options.measure[0], Path(options.measure[1]))
        return 0
    names = [row.name for row in ROWS]
    for name in options.only or ():
        if name not in names:
            near = get_close_matches(name, names, n=1)
            parser.error(f"no row {name!r}{f'; {near[0]!r}?' if near else ''} (--list has all)")
    if options.list:
        for row in ROWS:
            print(
                f"{row.name:24}{row.feature}, {row.model}{'  kept' if row.name in kept() else ''}"
            )
        return 0
    failed = 0 if options.table else run(options.only or names, options.again)
    replace(PAGE, "accuracy", markdown(kept()))
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
