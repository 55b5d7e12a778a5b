"""Run every contender side by side on EfficientNet-Lite0 and write the results.

Each contender runs in a fresh process held to one core. The contenders take turns, `--repeats`
times over, so that all of them and the floors see the same machine; medians are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import machine
import numpy as np
import table
from peers import FLOORS, HERE, OURS, PEERS, ROOT, Contender

RESULTS = HERE / "results" / "efficientnet_lite0.json"
WORK = ROOT / "outputs" / "bench"
# Wall time of one contender; on a busy machine it may need more.
TIME_LIMIT_S = int(os.environ.get("BENCH_TIME_LIMIT_S", "1200"))


def prepare() -> Path:
    """The crops, once for all contenders."""
    from real_models import calibration_crops, heldout_crops

    WORK.mkdir(parents=True, exist_ok=True)
    heldout = heldout_crops()
    inputs = WORK / "inputs.npz"
    np.savez(
        inputs,
        calibration=calibration_crops().images.numpy(),
        heldout=heldout.images.numpy(),
        labels=heldout.labels.numpy(),
    )
    return inputs


def environment() -> dict[str, str]:
    """Environment of every process that is measured."""
    paths = os.pathsep.join([str(HERE), str(ROOT / "examples")])
    return {**os.environ, **machine.SETTINGS, "PYTHONPATH": paths}


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one process to its end, held to one core."""
    return subprocess.run(
        command,
        env=environment(),
        cwd=WORK,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        preexec_fn=machine.hold_to_one_core,
    )


def run_once(contender: Contender, inputs: Path, evaluate: bool) -> dict:
    """One run: its `result.json`, or why there is none."""
    if not contender.python().exists():
        return {"left_out": f"environment {contender.environment!r} is not installed"}
    folder = WORK / contender.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    if evaluate:
        (folder / "logits.npz").unlink(missing_ok=True)
    command = [*contender.command(), "--inputs", str(inputs), "--folder", str(folder)]
    command += ["--float-onnx", str(WORK / "float.onnx")] + ["--evaluate"] * evaluate
    try:
        done = start(command)
    except subprocess.TimeoutExpired:
        return {"left_out": f"took longer than {TIME_LIMIT_S} s"}
    if done.returncode != 0 or not (folder / "result.json").exists():
        (folder / "stderr.txt").write_text(done.stderr)
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"left_out": f"failed: {last[:200]}"}
    result: dict = json.loads((folder / "result.json").read_text())
    return result


def summary(runs: list[dict]) -> dict:
    """Medians over the runs of one contender; the rest from the first, which was evaluated."""
    failed = [run for run in runs if "left_out" in run]
    if failed:
        return failed[0]
    phases = {
        name: {
            clock: statistics.median(run["phases"][name][clock] for run in runs)
            for clock in ("wall_s", "cpu_s")
        }
        for name in runs[0]["phases"]
    }
    memory = {
        name: statistics.median(run["memory"][name] for run in runs) for name in runs[0]["memory"]
    }
    files = runs[0]["files"]
    return {
        "packages": runs[0]["packages"],
        "phases": phases,
        "memory": memory,
        "file_mb": {role: Path(file).stat().st_size / 1e6 for role, file in files.items()},
        "note": runs[0]["note"],
        "files": files,
    }


def judge(results: Mapping[str, dict], inputs: Path) -> None:
    """Add fidelity and latency to the results, in place."""
    from fidelity import compare

    with np.load(inputs) as arrays:
        labels = arrays["labels"]
    with np.load(WORK / "float-torch" / "logits.npz") as arrays:
        reference = arrays["float"]
    for name, result in results.items():
        files = result.pop("files", {})
        logits_file = WORK / name / "logits.npz"
        if "left_out" in result or not logits_file.exists():
            continue
        with np.load(logits_file) as arrays:
            result["fidelity"] = {
                role: compare(reference, arrays[role], labels).as_dict() for role in arrays.files
            }
        if "qdq" in files:
            command = [sys.executable, str(HERE / "latency.py"), str(WORK / "float.onnx")]
            done = start([*command, files["qdq"], str(inputs)])
            result["latency"] = json.loads(done.stdout) if done.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="contenders to run; prints, writes no results")
    given = parser.parse_args()
    contenders = [*OURS, *PEERS]
    if given.only:
        unknown = set(given.only) - {contender.name for contender in contenders}
        if unknown:
            names = ", ".join(contender.name for contender in contenders)
            parser.error(f"unknown {', '.join(sorted(unknown))}; there are {names}")
        contenders = [contender for contender in contenders if contender.name in given.only]

    inputs = prepare()
    runs: dict[str, list[dict]] = {c.name: [] for c in [*FLOORS, *contenders]}
    for repeat in range(given.repeats):
        for contender in [*FLOORS, *contenders]:
            print(f"{repeat + 1}/{given.repeats} {contender.name}", flush=True)
            runs[contender.name].append(run_once(contender, inputs, evaluate=repeat == 0))
    results = {name: summary(of_one) for name, of_one in runs.items()}
    judge(results, inputs)
    document = {
        "machine": machine.describe(),
        "repeats": given.repeats,
        "calibration": "4 batches of 8 crops",
        "heldout_crops": 192,
        "contenders": results,
    }
    text = json.dumps(document, indent=1)
    if given.only:
        (WORK / "partial.json").write_text(text)
        print(table.markdown(document))
        return 0
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text + "\n")
    table.write(document)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "examples"))
    raise SystemExit(main())
