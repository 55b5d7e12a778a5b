"""What post-training quantization costs on a network of ResNet-50's shape.

Seconds of each step and the peak of resident memory, ours beside a process that only runs the
float network over the same batches; and the int8 file's speed beside ONNX Runtime's own. Each
measurement is a fresh process held to one core; peaks are of whole processes, imports included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import table
from contract import peak_mb

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "outputs" / "bench" / "resnet50"
RESULTS = HERE / "results" / "resnet50_flow.json"
BATCH, DISTINCT = 8, 2
INPUT = "input"


class Steps:
    """Wall and CPU seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure one step."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
        }


def batches(number: int) -> list[Any]:
    """`number` batches of 8; two distinct ones by turns, so that more take no more memory."""
    from resnet50 import images

    distinct = images(BATCH * DISTINCT).split(BATCH)
    return [distinct[i % DISTINCT] for i in range(number)]


def run_float(model: Any, data: list[Any], steps: Steps) -> None:
    """The floor: the float network, once to warm up, then over all batches."""
    import torch

    with torch.inference_mode():
        model(data[0])
        with steps.timed("float passes"):
            for batch in data:
                model(batch)


def run_export(model: Any, data: list[Any], steps: Steps) -> None:
    """The floor of all that writes ONNX: the float network to a file."""
    import torch

    with steps.timed("export"):
        torch.onnx.export(
            model,
            (data[0],),
            WORK / "float.onnx",
            dynamo=True,
            opset_version=18,
            input_names=[INPUT],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def run_amct(model: Any, data: list[Any], steps: Steps) -> None:
    """The whole flow."""
    import torch

    import amct_pytorch as amct

    config, record = WORK / "config.json", WORK / "record.txt"
    modified, saved = WORK / "modified.onnx", WORK / "resnet50"
    with steps.timed("create_quant_config"):
        amct.create_quant_config(config, model, data[0], batch_num=len(data))
    with steps.timed("quantize_model"):
        calibrated = amct.quantize_model(
            config,
            modified,
            record,
            model,
            data[0],
            input_names=[INPUT],
            output_names=["output"],
            dynamic_axes={INPUT: {0: "batch"}, "output": {0: "batch"}},
        )
    with steps.timed("calibrate"), torch.no_grad():
        for batch in data:
            calibrated(batch)
    with steps.timed("save_model"):
        amct.save_model(modified, record, saved)
    with steps.timed("deploy_to_qdq"):
        amct.deploy_to_qdq(WORK / "resnet50_deploy_model.onnx", WORK / "qdq.onnx")


def run_onnxruntime(_: Any, data: list[Any], steps: Steps) -> None:
    """ONNX Runtime's own static quantizer with what is its fastest here: u8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Feeds, one at a time."""

        feeds = iter([{INPUT: batch.numpy()} for batch in data])

        def get_next(self) -> dict[str, np.ndarray] | None:
            """The next feed, or None at the end."""
            return next(self.feeds, None)

    with steps.timed("quantize"):
        prepared = str(WORK / "prepared.onnx")
        quant_pre_process(str(WORK / "float.onnx"), prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            str(WORK / "onnxruntime.onnx"),
            Reader(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )


def run_latency(_: Any, data: list[Any], __: Steps) -> dict[str, float]:
    """Both int8 files beside the float one, in turns; the float file is the same for both."""
    from latency import measure

    found = {}
    for name, file in (("amct", "qdq.onnx"), ("onnxruntime", "onnxruntime.onnx")):
        measured = measure(str(WORK / "float.onnx"), str(WORK / file), data[0][:1].numpy())
        found |= {f"{name}_{key}": value for key, value in measured.items()}
    return found


RUNS = {
    "float": run_float,
    "export": run_export,
    "amct": run_amct,
    "onnxruntime": run_onnxruntime,
    "latency": run_latency,
}


def run_here(name: str, number: int) -> dict[str, Any]:
    """One measurement in this process."""
    import torch
    from resnet50 import resnet50

    torch.set_num_threads(1)
    steps = Steps()
    model, data = resnet50(), batches(number)
    with contextlib.redirect_stdout(io.StringIO()):
        found = RUNS[name](model, data, steps)
    return {"seconds": steps.seconds, "peak_mb": peak_mb(), **(found or {})}


def run_apart(name: str, number: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    print(f"{name}, {number} batches", flush=True)
    paths = os.pathsep.join([str(ROOT / "src"), str(HERE), str(ROOT / "examples")])
    done = subprocess.run(
        [sys.executable, __file__, "--here", name, str(number)],
        env={**os.environ, **machine.SETTINGS, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        preexec_fn=machine.hold_to_one_core,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def markdown(document: dict[str, Any]) -> str:
    """The tables."""
    runs = document["runs"]
    floor = {n: runs[f"float, {n}"]["seconds"]["float passes"]["cpu_s"] for n in (2, 16)}
    rows = []
    for step in runs["amct, 2"]["seconds"]:
        cpu = {n: runs[f"amct, {n}"]["seconds"][step]["cpu_s"] for n in (2, 16)}
        rows.append((f"`{step}`", *(f"{cpu[n]:.1f} ({cpu[n] / floor[n]:.1f})" for n in (2, 16))))
    flow = [
        sum(s["cpu_s"] for k, s in runs[f"amct, {n}"]["seconds"].items() if k != "deploy_to_qdq")
        for n in (2, 16)
    ]
    rows.append(("all but `deploy_to_qdq`", *(f"{seconds:.1f}" for seconds in flow)))
    rows.append(("floor: float passes", *(f"{floor[n]:.1f}" for n in (2, 16))))
    export = runs["export, 2"]["seconds"]["export"]["cpu_s"]
    rows.append(("floor: export alone", f"{export:.1f}", f"{export:.1f}"))
    peaks = {n: (runs[f"amct, {n}"]["peak_mb"], runs[f"float, {n}"]["peak_mb"]) for n in (2, 16)}
    cells = (f"{ours:.0f} MB ({ours / bare:.2f})" for ours, bare in peaks.values())
    rows.append(("peak memory (× the float process)", *cells))
    speed = runs["latency, 2"]
    speeds = []
    for label, name in (("**amct_pytorch**", "amct"), ("ONNX Runtime static, u8", "onnxruntime")):
        exact = speed.get(f"{name}_int8_speed_up")
        clipping = speed[f"{name}_int8_clipping_speed_up"]
        speeds.append((label, f"{exact:.2f}" if exact else table.ABSENT, f"{clipping:.2f}"))
    columns = ("int8 over float, batch 1", "exact kernels", "ONNX Runtime's default kernels")
    header = ("step", *(f"{n} batches of 8: CPU s (× float passes)" for n in (2, 16)))
    return "\n\n".join(
        [
            f"CPU: {document['machine']['cpu']}; one thread; one run of each.",
            table.lines(header, rows),
            table.lines(columns, speeds),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Costs of the flow on ResNet-50's shape.")
    parser.add_argument("--here", nargs=2, metavar=("RUN", "BATCHES"), help="for the harness")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(run_here(given.here[0], int(given.here[1]))))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    wanted = [("float", 2), ("float", 16), ("export", 2), ("amct", 16), ("amct", 2)]
    wanted += [("onnxruntime", 2), ("latency", 2)]
    runs = {f"{name}, {number}": run_apart(name, number) for name, number in wanted}
    document = {"machine": machine.describe(), "runs": runs}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    table.replace(HERE / "README.md", "flow", markdown(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
