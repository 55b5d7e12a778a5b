"""Calibrate EfficientNet-Lite0 on several processes, each with its share of the photos.

    torchrun --nproc-per-node 2 examples/calibrate_on_processes.py

Needs the packages of `examples/requirements.txt`. Files go to `outputs/processes/`; they are those
that one process writes.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from real_models import calibration_crops, efficientnet_lite0
from torch import distributed as dist

import amct_pytorch as amct

FOLDER = Path("outputs") / "processes"


def main() -> None:
    """The whole way; `batch_num` counts the batches of all processes."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = efficientnet_lite0()
    batches = calibration_crops().images.split(4)
    config, modified, record = (FOLDER / name for name in ("config.json", "m.onnx", "record.txt"))
    if rank == 0:
        amct.create_quant_config(config, model, batches[0], batch_num=len(batches))
    dist.barrier()
    calibrated = amct.quantize_model(config, modified, record, model, batches[0])
    with torch.no_grad():
        for batch in batches[rank::world]:
            calibrated(batch)
    if rank == 0:
        amct.save_model(modified, record, FOLDER / "lite0")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
