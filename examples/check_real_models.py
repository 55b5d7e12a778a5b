"""Check the figures of the three quantized networks against their goals: `make real-models`.

Exits with 1 if a network loses more than its example allows.
"""

from __future__ import annotations

import quantize_brain_mask
import quantize_sentence_encoder
import quantize_super_resolution
import torch

CHECKS = (
    (
        "all-MiniLM-L6-v2, Pearson",
        quantize_sentence_encoder.correlations,
        quantize_sentence_encoder,
    ),
    ("waifu2x, PSNR dB", quantize_super_resolution.quality, quantize_super_resolution),
    ("deepbrain, Dice", quantize_brain_mask.overlaps, quantize_brain_mask),
)


def main() -> int:
    """Run all, print one table."""
    torch.set_num_threads(1)
    lines, failed = [], False
    for label, measure, example in CHECKS:
        found, quantized = measure()
        lost = found["float"] - min(found.values())
        failed |= lost > example.LIMIT
        lines.append(
            f"{label:<28}{found['float']:>9.4f}{-lost:>+9.4f}{-example.GOAL:>+9.4f}  "
            f"{'MISSED' if lost > example.GOAL else 'reached'}; {quantized.summary()}"
        )
    print(f"\n{'network':<28}{'float':>9}{'worst':>9}{'goal':>9}")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
