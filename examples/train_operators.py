"""Quantization-aware operators: a LeNet-style network from scratch, and a ResNet by replacement.

    python examples/train_operators.py scratch     built of Conv2dQAT and LinearQAT
    python examples/train_operators.py replace     a trained ResNet whose layers are replaced
    python examples/train_operators.py replace --bits 4

Both end with files: the network as torch.onnx.export writes it (QuantizeLinear and
DequantizeLinear), and what convert_qat_model makes of that. Accuracies are on Fashion-MNIST's
10,000 test images (examples/fashion_mnist.py). Files go to `outputs/train_operators/`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

# Read once, when torch starts: one thread, which does not burn its core while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from fashion_mnist import accuracy, load, train, trained
from ort_sessions import cpu_session
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.nn.module.quantization import Conv2dQAT, LinearQAT

FOLDER = Path("outputs") / "train_operators"


def config(bits: int, batch_num: int = 4) -> dict[str, Any]:
    """The same config for every operator."""
    return {
        "retrain_data_config": {
            "dst_type": f"INT{bits}",
            "batch_num": batch_num,
            "fixed_min": None,  # fixed at 0 where no value below is seen: behind a ReLU
        },
        "retrain_weight_config": {"dst_type": f"INT{bits}"},
    }


def lenet(bits: int) -> nn.Sequential:
    """LeNet-5 in today's form: [N, 1, 28, 28] -> [N, 10]."""
    same = config(bits)
    return nn.Sequential(
        Conv2dQAT(1, 16, 5, padding=2, config=same),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Conv2dQAT(16, 32, 5, config=same),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        LinearQAT(32 * 25, 120, config=same),
        nn.ReLU(),
        LinearQAT(120, 84, config=same),
        nn.ReLU(),
        LinearQAT(84, 10, config=same),
    )


def replace(model: nn.Module, settings: dict[str, Any]) -> None:
    """Puts a quantization-aware operator in the place of each Conv2d and Linear, in place."""
    for name, child in model.named_children():
        if type(child) is nn.Conv2d:
            setattr(model, name, Conv2dQAT.from_float(child, settings))
        elif type(child) is nn.Linear:
            setattr(model, name, LinearQAT.from_float(child, settings))
        else:
            replace(child, settings)


def parameters(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for an optimizer: clip values are not weights, and do not decay."""
    clips = [p for name, p in model.named_parameters() if "_quantizer.clip_" in name]
    others = [p for name, p in model.named_parameters() if "_quantizer.clip_" not in name]
    return [{"params": others}, {"params": clips, "weight_decay": 0.0}]


def written(model: nn.Module, folder: Path, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Exports and converts; accuracy of each file, in percent."""
    model.eval()
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model,
        (images[:2],),
        folder / "trained.onnx",
        input_names=["image"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        verbose=False,
        opset_version=18,
        optimize=False,  # see docs/qat_operators.md, 5
    )
    amct.convert_qat_model(folder / "trained.onnx", folder / "net", folder / "record.txt")

    def of(session: Any) -> float:
        return accuracy(
            lambda part: torch.from_numpy(session.run(None, {"image": part.numpy()})[0]),
            images,
            labels,
        )

    return {
        "QDQ file": of(cpu_session(folder / "trained.onnx")),
        "fake-quant file": of(cpu_session(folder / "net_fake_quant_model.onnx")),
        "deploy file": of(amct.DeploySession(folder / "net_deploy_model.onnx")),
    }


def run(
    what: str, bits: int = 8, number: int = 60000, epochs: int = 1, width: int = 32
) -> dict[str, float]:
    """Accuracies in percent.

    Args:
        what: ``scratch`` or ``replace``.
        bits: of weights and inputs, 8 or 4.
        number: training images.
        epochs: with quantized operators.
        width: of the ResNet.
    """
    folder = FOLDER / f"{what}_int{bits}"
    folder.mkdir(parents=True, exist_ok=True)
    pictures, classes = (part[:number] for part in load("train"))
    images, labels = load("t10k")
    torch.manual_seed(0)
    result: dict[str, float] = {}
    if what == "scratch":
        model, rate = lenet(bits), 0.05
    else:
        model, rate = trained(width), 0.02
        result["float"] = accuracy(model, images, labels)
        replace(model, config(bits))
    train(model, pictures, classes, rate, epochs)
    result["trained"] = accuracy(model, images, labels)
    result.update(written(model, folder, images, labels))
    return result


def main() -> None:
    """Prints the accuracies as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["scratch", "replace"])
    parser.add_argument("--bits", type=int, choices=[8, 4], default=8)
    parser.add_argument("--images", type=int, default=60000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()
    result = run(options.what, options.bits, options.images, options.epochs, options.width)
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))


if __name__ == "__main__":
    main()
