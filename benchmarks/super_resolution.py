"""waifu2x to int8 by this toolkit and by ONNX Runtime's own quantizer: PSNR on held-out photos.

    python benchmarks/super_resolution.py

The same float model, the same 8 photos to calibrate on, the same 12 to judge; ONNX Runtime gets
u8 inputs, int8 weights by channel, and each of its ways to choose ranges.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import onnxruntime as ort
import torch
from ort_sessions import cpu_session
from quantize_super_resolution import CALIBRATION, HELD_OUT, network_input
from super_resolution import BORDER, Pair, mean_psnr, photo_pairs, waifu2x
from torch import Tensor, nn

METHODS = ("MinMax", "Percentile", "Entropy")


def peer_session(float_file: Path, pairs: list[Pair], method: str, folder: Path):
    """A session of ONNX Runtime's own quantized model."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Photos(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict] = iter(
                [{"image": network_input(pair.small).numpy()} for pair in pairs]
            )

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    file = folder / f"{method}.onnx"
    quantize_static(
        float_file,
        file,
        Photos(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )
    return cpu_session(file)


class OfSession(nn.Module):
    """A session as a module."""

    def __init__(self, run: ort.InferenceSession) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """The image."""
        (found,) = self.run.run(None, {self.run.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(np.asarray(found))


def main() -> None:
    """Print the table."""
    from quantize_super_resolution import quality

    torch.set_num_threads(1)
    ours, _ = quality()
    model, held_out = waifu2x(), photo_pairs(HELD_OUT)
    rows = dict(ours)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        float_file = folder / "float.onnx"
        example = torch.zeros(1, 3, 128 + 2 * BORDER, 128 + 2 * BORDER)
        torch.onnx.export(
            model, (example,), float_file, input_names=["image"], dynamo=True, external_data=False
        )
        for method in METHODS:
            run = peer_session(float_file, photo_pairs(CALIBRATION), method, folder)
            rows[f"ONNX Runtime, {method}"] = mean_psnr(OfSession(run), held_out)
    print("| model | PSNR dB | to float |\n| --- | --- | --- |")
    for what, value in rows.items():
        print(f"| {what} | {value:.2f} | {value - rows['float']:+.3f} |")


if __name__ == "__main__":
    main()
