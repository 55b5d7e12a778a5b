"""What distillation reaches on EfficientNet-Lite0, and what it costs.

    python benchmarks/distillation.py [w8a8] [w4a8]

64 crops of 8 photos without labels; SQNR of logits and top-1 agreement with float on 192 crops of
12 other photos. W4A8: 4-bit weights where two fit into a byte; depthwise convolutions and the stem
keep 8. Cost: CPU time over that of forward and backward of the float network on the same samples,
and the process's peak memory over what it held before. Results go to `results/distillation.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import amct_pytorch as amct

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from fidelity import compare
from real_models import calibration_crops, efficientnet_lite0, heldout_crops

RESULTS = Path(__file__).parent / "results" / "distillation.json"
BATCH = 8


def config_file(model: nn.Module, batch: Tensor, folder: Path, bits: int, group: int) -> Path:
    """A config with weights of so many bits where they can be packed."""
    path = folder / "distill.json"
    definition = folder / "distill.cfg"
    definition.write_text(f"batch_num: 4 group_size: {group}")
    amct.create_distill_config(path, model, batch, definition)
    document = json.loads(path.read_text())
    for name, value in document.items():
        if isinstance(value, dict) and bits == 4:
            layer: Any = model.get_submodule(name)
            channels = getattr(layer, "in_channels", getattr(layer, "in_features", 0))
            if getattr(layer, "groups", 1) == 1 and channels % 2 == 0:
                value["distill_weight_config"]["dst_type"] = "INT4"
    path.write_text(json.dumps(document))
    return path


def floor(model: nn.Module, batches: list[Tensor], epochs: int) -> float:
    """CPU seconds of the float network's forward and backward over the samples."""
    began = time.process_time()
    for _ in range(epochs):
        for batch in batches:
            model(batch).square().mean().backward()
    model.zero_grad()
    return time.process_time() - began


def run(bits: int, epochs: int, group: int, rate: float) -> dict[str, Any]:
    """One row."""
    model = efficientnet_lite0()
    batches = list(calibration_crops(8).images.split(BATCH))
    images, labels = heldout_crops()
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in images.split(32)])

    def judged(network: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = torch.cat([network(part) for part in images.split(32)])
        fidelity = compare(wanted.numpy(), found.numpy(), labels.numpy())
        return {
            "sqnr_db": round(fidelity.sqnr_db, 2),
            "agreement": round(100 * fidelity.agreement, 2),
        }

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_file(model, batches[0], folder, bits, group)
        student = amct.create_distill_model(config, model, batches[0])
        plain = amct.distill(
            model, student, config, batches, epochs=0, progress_dir=folder / "progress"
        )
        row: dict[str, Any] = {"ranges only": judged(plain)}
        del plain
        cost = floor(model, batches, epochs)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        distilled = amct.distill(
            model,
            student,
            config,
            batches,
            epochs=epochs,
            lr=rate,
            progress_dir=folder / "progress",
        )
        seconds = time.process_time() - began
    row |= {
        "distilled": judged(distilled),
        "settings": {"epochs": epochs, "group_size": group, "lr": rate},
        "cpu_seconds": round(seconds, 1),
        "over_float_forward_backward": round(seconds / cost, 2),
        "peak_mb_before": before // 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "blocks_that_fell": sum(o.loss_after < o.loss_before for o in distilled.outcomes),
        "blocks": len(distilled.outcomes),
    }
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=["w8a8", "w4a8"], choices=("w8a8", "w4a8", []))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--lr", type=float, help="1e-4 with 8 bits, 1e-3 with 4")
    parser.add_argument("--no-write", action="store_true")
    settings = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in settings.rows:
        bits = int(name[1])
        rate = settings.lr or {8: 1e-4, 4: 1e-3}[bits]
        results[name] = run(bits, settings.epochs, settings.group_size, rate)
        print(name, json.dumps(results[name]), flush=True)
    if not settings.no_write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
