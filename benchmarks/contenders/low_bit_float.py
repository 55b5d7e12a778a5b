"""The float model, and the CPU seconds of one pass over the calibration tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_bit_contract import Task


def main() -> None:
    task = Task()
    model = task.model()
    with task.timed(), torch.inference_mode():
        for batch in task.tokens("calibration").split(8):
            model(batch)
    task.finish(model, torch.__version__)


if __name__ == "__main__":
    main()
