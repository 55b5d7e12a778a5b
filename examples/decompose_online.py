"""Decompose a real network, fine-tune it, and save both structure and weights.

waifu2x's large convolutions become two small ones each, fitted to what the layers answer on crops
of twelve photos; eight others judge the result. The fine-tuned weights and the info file
are what `decompose_offline.py` starts from, in another process.

    python examples/decompose_online.py --steps 200
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from super_resolution import calibration_batches, finetune, mean_psnr, photo_pairs, waifu2x

import amct_pytorch as amct

HELD_OUT = slice(0, 8)
TRAINING = slice(8, 20)


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/decomposition"))
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning")
    parser.add_argument("--rate", type=float, default=2e-5, help="largest learning rate")
    parser.add_argument(
        "--flops-ratio", type=float, default=0.7, help="FLOPs a split layer may keep"
    )
    options = parser.parse_args()
    folder: Path = options.folder

    original = waifu2x()
    pairs = photo_pairs(HELD_OUT)
    model, changes = amct.auto_decomposition(
        copy.deepcopy(original),
        folder / "decomposed.json",
        rank_policy="flops",
        flops_ratio=options.flops_ratio,
        input_data=torch.rand(1, 3, 142, 142),
        calibration_data=calibration_batches(TRAINING),
    )
    ledger = json.loads((folder / "decomposed_ledger.json").read_text())
    for entry in ledger["layers"]:
        what = entry["reason"]
        if entry["status"] == "decomposed":
            what = f"rank {entry['rank']}, output error {entry['output_error']:.3f}"
        print(f"{entry['name']:>4} {entry['status']:<10} {what}")
    totals = ledger["totals"]
    ratio = totals["flops_before"] / totals["flops_after"]
    print(f"{len(changes)} layers split; Conv2d FLOPs {ratio:.2f} times fewer")

    before = mean_psnr(original, pairs)
    print(f"PSNR of the held-out photos: {before:.2f} dB; split {mean_psnr(model, pairs):.2f} dB")
    began = time.perf_counter()
    finetune(model, TRAINING, options.steps, options.rate)
    after = mean_psnr(model, pairs)
    seconds = time.perf_counter() - began
    print(f"after {options.steps} steps ({seconds:.0f} s): {after:.2f} dB ({after - before:+.2f})")
    torch.save(model.state_dict(), folder / "decomposed.pth")
    print(f"wrote {folder}/decomposed.json, decomposed_ledger.json, decomposed.pth")


if __name__ == "__main__":
    main()
