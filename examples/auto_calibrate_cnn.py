"""Search a config of EfficientNet-Lite0 that meets an accuracy target: which layers stay float.

    python examples/auto_calibrate_cnn.py --agreement 0.96

The metric is how often the network gives the float network's most likely class, on crops of 12
photos that calibration never saw. Files go to `outputs/auto_calibration/`; the search may be
interrupted, and the same call goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from real_models import calibration_crops, efficientnet_lite0, heldout_crops
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.common.auto_calibration import AutoCalibrationEvaluatorBase

BATCH = 8
FOLDER = Path("outputs") / "auto_calibration"


class Agreement(AutoCalibrationEvaluatorBase):
    """Share of crops on which a network agrees with the first one that was evaluated.

    Args:
        least: what is good enough.
    """

    def __init__(self, least: float) -> None:
        self.least = least
        self.batches = calibration_crops().images.split(BATCH)
        self.heldout = heldout_crops().images.split(BATCH)
        self.classes: Tensor | None = None
        self.seconds: list[float] = []

    def calibration(self, model: nn.Module) -> None:
        """Four batches of 8 crops."""
        with torch.no_grad():
            for batch in self.batches:
                model(batch)

    def evaluate(self, model: nn.Module) -> float:
        """Agreement, 1 for the first network."""
        started = time.perf_counter()
        with torch.no_grad():
            found = torch.cat([model(batch).argmax(1) for batch in self.heldout])
        if self.classes is None:
            self.classes = found
        self.seconds.append(time.perf_counter() - started)
        return float((found == self.classes).float().mean())

    def metric_eval(self, original_metric: float, new_metric: float) -> tuple[bool, float]:
        """Whether it agrees often enough."""
        return new_metric >= self.least, original_metric - new_metric


def main() -> None:
    """Search, print what was tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agreement", type=float, default=0.96, help="least agreement wanted")
    options = parser.parse_args()
    logging.getLogger("amct_pytorch").setLevel(logging.INFO)
    torch.set_num_threads(1)
    model, evaluator = efficientnet_lite0(), Agreement(options.agreement)
    config = FOLDER / "config.json"
    amct.create_quant_config(config, model, evaluator.batches[0], batch_num=len(evaluator.batches))
    started = time.perf_counter()
    amct.accuracy_based_auto_calibration(
        model, evaluator, config, FOLDER / "record.txt", FOLDER / "lite0", evaluator.batches[0]
    )
    print(
        f"{time.perf_counter() - started:.0f} s; evaluation of the float network "
        f"{evaluator.seconds[0]:.1f} s, of the others "
        f"{', '.join(f'{seconds:.1f}' for seconds in evaluator.seconds[1:])} s"
    )


if __name__ == "__main__":
    main()
