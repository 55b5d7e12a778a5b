"""Quantize a real 3-D U-Net to int8 and judge its brain mask by the Dice overlap.

Calibrates on changed copies of the one scan there is (shifted, mirrored, noisier), judges on the
scan itself. `brain_mask.py` says where the scan comes from. Files go to `outputs/brain_mask/`.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from brain_mask import brain_net, calibration_scans, dice, scan
from flow import Quantized, quantize

FOLDER = Path("outputs") / "brain_mask"
GOAL = 0.003
"""Most that the Dice overlap may lose."""
LIMIT = GOAL


def overlaps() -> tuple[dict[str, float], Quantized]:
    """Dice overlap with the true brain of the float, simulated and deployed network."""
    model = brain_net()
    quantized = quantize(model, [(head,) for head in calibration_scans()], FOLDER, ["head"])
    judged = scan()
    networks = {"float": model, "simulated int8": quantized.simulated}
    networks["deploy, DeploySession"] = quantized.deployed()
    with torch.no_grad():
        found = {name: dice(run(judged.head), judged.brain) for name, run in networks.items()}
    return found, quantized


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found, quantized = overlaps()
    print(f"\ndeepbrain's 3-D U-Net on one scan; {quantized.summary()}")
    print(f"{'model':<24}{'Dice':>9}{'to float':>10}")
    for name, value in found.items():
        print(f"{name:<24}{value:>9.4f}{value - found['float']:>+10.4f}")


if __name__ == "__main__":
    main()
