"""What the rows of the accuracy table are made of, and how they read what an example printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from machine import SETTINGS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@dataclass(frozen=True)
class Figures:
    """What one row found.

    Attributes:
        float: the metric of the float network; None where the metric compares with it.
        compressed: the metric of what was made of it.
        size: bytes of the deployed weights or file over those of the float network; None: the
            row writes none.
        note: what else a reader wants to know.
    """

    float: float | None
    compressed: float
    size: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: what ``--only`` takes.
        feature: for readers.
        model: for readers.
        metric: for readers, with its unit.
        measure: does the work; files of its own go into the folder that it gets.
    """

    name: str
    feature: str
    model: str
    metric: str
    measure: Callable[[Path], Figures]


def printed(script: str, *options: str) -> str:
    """What an example prints; it goes on to the terminal too."""
    command = [sys.executable, "-u", str(EXAMPLES / script), *options]
    lines = []
    environment = {**os.environ, **SETTINGS}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{script} ended with {process.returncode}")
    return "".join(lines)


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers that a pattern finds in what an example printed; ends the row if it does not."""
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"nothing printed fits {pattern!r}; has the example changed?")
    return [float(group) for group in found.groups()]


def ledger_size(ledger: Path) -> float:
    """Bytes of the deploy model over those of the float ONNX file."""
    sizes = json.loads(ledger.read_text())["bytes"]
    return float(sizes["deploy"] / sizes["float"])


def over_fashion(file: Path) -> float:
    """Bytes of a file over those of the float Fashion-MNIST network's weights."""
    from fashion_mnist import resnet

    return file.stat().st_size / sum(4 * p.numel() for p in resnet().parameters())
