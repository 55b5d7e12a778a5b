"""ModelOpt: AWQ (awq_lite), int4 symmetric in groups of 64; it has no asymmetric form of it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import modelopt
import modelopt.torch.quantization as mtq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_bit_contract import GROUP, Task


def main() -> None:
    task = Task()
    model, calibration = task.model(), task.tokens("calibration")
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"][-1] = GROUP

    def forward(quantized: torch.nn.Module) -> None:
        for batch in calibration.split(8):
            quantized(batch)

    with task.timed(), torch.no_grad():
        model = mtq.quantize(model, config, forward)
    task.finish(model, modelopt.__version__)


if __name__ == "__main__":
    main()
