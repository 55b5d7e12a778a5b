"""Quantize EfficientNet-Lite0 to int8 and compare it with the float network.

Calibrates on 32 crops of 8 photos, writes the files under `outputs/quantize_cnn/`, and evaluates
on crops of 12 other photos. Run it with `make demo`, or with the packages of
`examples/requirements.txt` installed: `python examples/quantize_cnn.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read once, when torch starts: one thread, which does not burn its core while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from fidelity import Fidelity, compare
from ort_sessions import Runs, cpu_options, cpu_session, interleaved_latency, run_batches
from real_models import calibration_crops, efficientnet_lite0, heldout_crops
from tqdm import tqdm

import amct_pytorch as amct
from amct_pytorch.report.html import write_report

BATCH = 8
FOLDER = Path("outputs") / "quantize_cnn"
NEXT_STEPS = """What to do next
  - Open lite0_report.html in a browser: what was done to each layer and the error it has now.
    The same is in lite0_ledger.json, for programs.
  - Edit config.json (skip a layer, another range search) and run again:
    .venv/bin/python examples/quantize_cnn.py --keep-config
  - Run lite0_qdq_model.onnx with ONNX Runtime or any runtime that knows QuantizeLinear; on x86
    without VNNI set the session entry session.x64quantprecision to "1" (examples/ort_sessions.py).
  - lite0_deploy_model.onnx is for Ascend's ATC; amct.DeploySession runs it on any CPU, exactly.
  - Put your own network in: docs/ptq.md goes through each step, and through poor accuracy."""


def quantize(model: torch.nn.Module, images: torch.Tensor, keep_config: bool) -> dict[str, Path]:
    """The whole way from the float network to int8 files."""
    batches = images.split(BATCH)
    config = FOLDER / "config.json"
    modified, record = FOLDER / "modified.onnx", FOLDER / "record.txt"

    if not (keep_config and config.exists()):
        with step("config: what will be quantized, and how"):
            amct.create_quant_config(config, model, batches[0], batch_num=len(batches))
    with step("instrument the network, write the float ONNX"):
        calibrated = amct.quantize_model(
            config,
            modified,
            record,
            model,
            batches[0],
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    with step("calibrate"), torch.no_grad():
        for batch in tqdm(batches, desc="  calibration", unit="batch"):
            calibrated(batch)
    with step("save the fake-quant and the deploy model"):
        amct.save_model(modified, record, FOLDER / "lite0")
    files = {
        "fake-quant": FOLDER / "lite0_fake_quant_model.onnx",
        "deploy": FOLDER / "lite0_deploy_model.onnx",
        "QDQ": FOLDER / "lite0_qdq_model.onnx",
    }
    with step("turn the deploy model into portable QDQ"):
        amct.deploy_to_qdq(files["deploy"], files["QDQ"])
    return files


def export_float(model: torch.nn.Module, image: torch.Tensor) -> Path:
    """The float network as ONNX, to compare sizes and latencies with."""
    file = FOLDER / "float.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # packages it would like to have
    with step("export the float network, for comparison"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (image,),
            file,
            dynamo=True,
            input_names=["image"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    return file


def evaluate(files: dict[str, Path], images: np.ndarray, labels: np.ndarray) -> None:
    """Print the table of all models."""
    sessions: dict[str, Runs] = {
        "float": cpu_session(files["float"]),
        "fake-quant": cpu_session(files["fake-quant"]),
        "deploy": amct.DeploySession(files["deploy"], cpu_options()),
        "QDQ": cpu_session(files["QDQ"]),
    }
    logits = {}
    for name, session in tqdm(sessions.items(), desc="  evaluation", unit="model"):
        logits[name] = run_batches(session, images, BATCH)
    times = interleaved_latency(sessions, images[:1], rounds=40)

    print(f"\n{len(images)} crops of 12 photos that calibration did not see")
    print(
        f"{'model':<12}{'top-1':>8}{'top-5':>8}{'agree':>8}{'cosine':>9}{'SQNR dB':>9}"
        f"{'MB':>7}{'ms':>8}   runs in"
    )
    for name in sessions:
        judged = compare(logits["float"], logits[name], labels)
        print(row(name, judged, files[name], statistics.median(times[name])))
    speed_up = statistics.median(a / b for a, b in zip(times["float"], times["QDQ"], strict=True))
    print(
        "\nagree: same best class as float. cosine, SQNR: of the logits. ms: one image, one thread,"
        f"\nmedian. QDQ is {speed_up:.2f} times as fast as float on this CPU."
    )


def row(name: str, judged: Fidelity, file: Path, milliseconds: float) -> str:
    """One line of the table."""
    runtime = "amct.DeploySession" if name == "deploy" else "ONNX Runtime"
    return (
        f"{name:<12}{judged.top1:>8.1%}{judged.top5:>8.1%}{judged.agreement:>8.1%}"
        f"{judged.cosine:>9.4f}{judged.sqnr_db:>9.2f}{file.stat().st_size / 1e6:>7.1f}"
        f"{milliseconds:>8.1f}   {runtime}"
    )


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    print(f"- {text}", flush=True)
    start = time.perf_counter()
    yield
    print(f"  {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    """Quantize, evaluate, say what to do next."""
    parser = argparse.ArgumentParser(description="Quantize EfficientNet-Lite0 and compare.")
    parser.add_argument("--keep-config", action="store_true", help="use config.json as it is")
    given = parser.parse_args()

    torch.set_num_threads(1)
    start = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = efficientnet_lite0()
    calibration = calibration_crops().images
    print(f"EfficientNet-Lite0, {len(calibration)} calibration crops of 8 photos")
    files = quantize(model, calibration, given.keep_config)
    files["float"] = export_float(model, calibration[:2])
    heldout = heldout_crops()
    evaluate(files, heldout.images.numpy(), heldout.labels.numpy())
    write_report(FOLDER / "lite0_ledger.json", FOLDER / "lite0_report.html")
    print(f"\nFiles in {FOLDER}/ ({time.perf_counter() - start:.0f} s in all):")
    for file in sorted(FOLDER.iterdir()):
        print(f"  {file.name:<32}{file.stat().st_size / 1e6:>8.2f} MB")
    print(f"\n{NEXT_STEPS}")


if __name__ == "__main__":
    main()
