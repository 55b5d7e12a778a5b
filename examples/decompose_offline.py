"""Rebuild the network that `decompose_online.py` saved, and write it as ONNX.

Nothing is solved here: the info file says which layers are split into what shapes, and the
weights come from the saved state dict. The latency of both networks is then compared in ONNX
Runtime.

    python examples/decompose_online.py
    python examples/decompose_offline.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import onnxruntime
import torch
from super_resolution import mean_psnr, photo_pairs, waifu2x
from torch import nn

import amct_pytorch as amct


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/decomposition"))
    parser.add_argument("--size", type=int, default=142, help="height and width of the input")
    options = parser.parse_args()
    folder: Path = options.folder

    original = waifu2x()
    model, changes = amct.decompose_network(waifu2x(), folder / "decomposed.json")
    model.load_state_dict(torch.load(folder / "decomposed.pth", weights_only=True))
    print(f"rebuilt {', '.join(changes)} from {folder}/decomposed.json")
    pairs = photo_pairs(slice(0, 8))
    print(f"PSNR: {mean_psnr(original, pairs):.2f} dB, split {mean_psnr(model, pairs):.2f} dB")

    x = torch.rand(1, 3, options.size, options.size)
    sessions = [
        session(network, x, folder / name)
        for network, name in ((original, "original.onnx"), (model, "decomposed.onnx"))
    ]
    before, after = latencies(sessions, x)
    print(f"ONNX Runtime, one thread: {before:.1f} ms, split {after:.1f} ms ({before / after:.2f})")


def session(model: nn.Module, x: torch.Tensor, path: Path) -> onnxruntime.InferenceSession:
    """The model as an ONNX file, opened in ONNX Runtime with one thread."""
    torch.onnx.export(
        model, (x,), path, input_names=["image"], dynamo=True, external_data=False, verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def latencies(
    sessions: list[onnxruntime.InferenceSession], x: torch.Tensor, rounds: int = 15
) -> list[float]:
    """Milliseconds of the fastest of `rounds` runs of each session, taking turns."""
    best = [float("inf")] * len(sessions)
    for _ in range(rounds):
        for place, opened in enumerate(sessions):
            began = time.perf_counter()
            opened.run(None, {"image": x.numpy()})
            best[place] = min(best[place], time.perf_counter() - began)
    return [1e3 * seconds for seconds in best]


if __name__ == "__main__":
    main()
