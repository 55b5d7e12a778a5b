"""What every contender is given, and what it hands back.

A contender is a script that runs in a fresh process, in an environment of its own. It gets the
same crops and the same float network as all others, quantizes inside `Job.call()`, and ends with
`Job.finish()`, where it says how to get logits of the held-out crops. Needs numpy only.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np


def arguments() -> argparse.ArgumentParser:
    """The arguments that the harness passes; a contender may add its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=Path, required=True, help=".npz with the crops")
    parser.add_argument("--float-onnx", type=Path, required=True, help="the float network")
    parser.add_argument("--folder", type=Path, required=True, help="where results go")
    parser.add_argument("--batches", type=int, default=4, help="calibration batches")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--evaluate", action="store_true", help="logits too, not only time")
    return parser


class Job:
    """One run of one contender."""

    def __init__(self, given: argparse.Namespace | None = None) -> None:
        given = given or arguments().parse_args()
        self.folder: Path = given.folder
        self.float_onnx: Path = given.float_onnx
        self.batches: int = given.batches
        self.batch_size: int = given.batch_size
        self._evaluate: bool = given.evaluate
        self._inputs: Path = given.inputs
        self._phases: dict[str, dict[str, float]] = {}
        self._memory: dict[str, float] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def calibration_batches(self) -> list[np.ndarray]:
        """`batches` batches of `batch_size`; the crops start over when they run out.

        All are views of the same 32 crops, so that more batches do not take more memory here.
        """
        with np.load(self._inputs) as arrays:
            crops = arrays["calibration"]
        if len(crops) % self.batch_size:
            raise ValueError(f"{len(crops)} crops cannot be cut into batches of {self.batch_size}")
        starts = [i * self.batch_size % len(crops) for i in range(self.batches)]
        return [crops[start : start + self.batch_size] for start in starts]

    @contextmanager
    def call(self) -> Iterator[None]:
        """All that a user waits for: from the float network to the quantized one."""
        self._memory["before_mb"] = resident_mb()
        with self.phase("call"):
            yield
        self._memory["peak_mb"] = peak_mb()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the call, by the wall and in CPU seconds of this process."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self._phases[name] = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
        }

    def finish(
        self,
        packages: Sequence[str],
        logits: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
        files: Mapping[str, Path] | None = None,
        note: str = "",
    ) -> None:
        """Write the measurements, and the logits when this run is one that is evaluated.

        `logits`: by role ("simulated", "qdq", ...) a function from held-out crops to logits.
        `files`: ONNX files by role; the latency of the one called "qdq" is measured.
        """
        if self._evaluate and logits:
            with np.load(self._inputs) as arrays:
                heldout = arrays["heldout"]
            results = {role: run(heldout).astype(np.float32) for role, run in logits.items()}
            np.savez(self.folder / "logits.npz", **results)  # type: ignore[arg-type]
        result = {
            "packages": {name: version(name) for name in packages},
            "phases": self._phases,
            "memory": self._memory,
            "files": {role: str(path) for role, path in (files or {}).items()},
            "note": note,
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=1))


def resident_mb() -> float:
    """Resident memory of this process now, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def peak_mb() -> float:
    """The most resident memory this process ever had, in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
