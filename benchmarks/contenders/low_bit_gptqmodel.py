"""GPTQModel: GPTQ, int4 asymmetric in groups of 64, its own defaults otherwise."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# With fewer than two workers it refuses to load a model, and on two cores it takes one.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig, __version__

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_bit_contract import GROUP, Task


def main() -> None:
    task = Task()
    config = QuantizeConfig(bits=4, group_size=GROUP, sym=False, offload_to_disk=False)
    model = GPTQModel.load(task.folder, config, device="cpu", dtype="float32")
    windows = [
        {"input_ids": window.tolist(), "attention_mask": [1] * len(window)}
        for window in task.tokens("calibration")
    ]
    with task.timed():
        model.quantize(windows, batch_size=8)
    folder = str(task.out.parent / "gptqmodel")
    model.save(folder)
    packed = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype="float32")
    task.finish(packed.model.eval(), __version__)


if __name__ == "__main__":
    main()
