"""Quantize EfficientNet-Lite0 with nothing but raw `.bin` files: `ModelEvaluator` and the search.

    python examples/auto_calibrate_bin.py

The crops are written as files first, which stands for what a preprocessing tool leaves: one file a
batch. There are no labels: the metric is the cosine similarity to the float network's outputs.
Files go to `outputs/auto_calibration_bin/`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from real_models import calibration_crops, efficientnet_lite0

import amct_pytorch as amct

FOLDER = Path("outputs") / "auto_calibration_bin"
STEM = "accuracy_based_auto_calibration"


def main() -> None:
    """Writes the files, searches, says what came out."""
    torch.set_num_threads(1)
    data = FOLDER / "data"
    data.mkdir(parents=True, exist_ok=True)
    batches = calibration_crops().images.split(8)
    for number, batch in enumerate(batches):
        batch.numpy().tofile(data / f"batch_{number:02d}.bin")

    model, example = efficientnet_lite0(), torch.zeros(8, 3, 224, 224)
    evaluator = amct.ModelEvaluator(str(data), "input:8,3,224,224", "float32")
    config = FOLDER / "config.json"
    amct.create_quant_config(config, model, example, batch_num=len(batches))
    amct.accuracy_based_auto_calibration(
        model, evaluator, config, FOLDER / "record.txt", FOLDER / "lite0", example
    )
    for trial in json.loads((FOLDER / f"{STEM}_record.json").read_text())["trials"]:
        said = "good enough" if trial["accepted"] else "not good enough"
        print(f"{len(trial['rolled_back'])} layers in float: cosine {trial['metric']:.5f}, {said}")


if __name__ == "__main__":
    main()
