"""amct_pytorch: int4, asymmetric, groups of 64, by the algorithm that the argument names."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_bit_contract import GROUP, Task

import amct_pytorch as amct

WEIGHTS = {"type": "int4", "strategy": "group", "group_size": GROUP}
BATCH = 8


def main() -> None:
    task = Task()
    algorithm, symmetric = task.arguments[0], "symmetric" in task.arguments[1:]
    model, batches = task.model(), task.tokens("calibration").split(BATCH)
    config = {
        "batch_num": len(batches),
        "quant_cfg": {"weights": {**WEIGHTS, "symmetric": symmetric}},
        "algorithm": algorithm,
        "skip_layers": "lm_head",
    }
    with task.timed():
        amct.quantize(model, config)
        with torch.inference_mode():
            for batch in batches:
                model(batch)
        amct.convert(model)
    for layer in model.modules():
        if isinstance(layer, amct.low_bit.deploy_linear.LowBitLinear):
            layer.backend = "reference"
    task.finish(model, amct.__version__)


if __name__ == "__main__":
    main()
