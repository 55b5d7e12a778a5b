"""Quantization-aware training of whole models: what it reaches and what it costs.

    python benchmarks/qat_flow.py costs           one training step beside the float one
    python benchmarks/qat_flow.py steady          memory of a process over 3000 steps
    python benchmarks/qat_flow.py lite0           EfficientNet-Lite0 by its own logits, 100 steps
    python benchmarks/qat_flow.py fashion         a small ResNet on Fashion-MNIST, int8 and int4
    python benchmarks/qat_flow.py processes       the same on two processes and on one

`fashion` and `processes` need the Debian package dataset-fashion-mnist (examples/fashion_mnist.py).
Results go to `results/qat_flow.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from machine import SETTINGS, describe

os.environ.update(SETTINGS)  # before torch is imported

import numpy as np
import torch
from torch import Tensor, nn
from training_step import stepper

import amct_pytorch as amct
from amct_pytorch.nn.retrain import retrain_layers

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

RESULTS = Path(__file__).parent / "results" / "qat_flow.json"


# --- costs -------------------------------------------------------------------------------------


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks, and a batch for each."""
    from fashion_mnist import resnet
    from real_models import efficientnet_lite0

    return {
        "small ResNet, 64 x 28 x 28": (resnet(), torch.randn(64, 1, 28, 28)),
        "EfficientNet-Lite0, 4 x 224 x 224": (efficientnet_lite0(), torch.randn(4, 3, 224, 224)),
    }


def run_costs(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a step and peak memory, as ratios to the float network's."""
    torch.manual_seed(0)
    found = {}
    for name, (model, x) in networks().items():
        with tempfile.TemporaryDirectory() as folder:
            steps = {"float": stepper(copy.deepcopy(model), x)}
            steps["trained"] = stepper(create(model, x, Path(folder)), x)
            for step in steps.values():
                step()
                step()
            seconds: dict[str, list[float]] = {kind: [] for kind in steps}
            for _ in range(options.rounds):
                for kind, step in steps.items():
                    began = time.process_time()
                    step()
                    seconds[kind].append(time.process_time() - began)
        peaks = {kind: peak_of(name, kind) for kind in ("nothing", "float", "trained")}
        found[name] = {
            "float_cpu_s": median(seconds["float"]),
            "time_ratio": median(seconds["trained"]) / median(seconds["float"]),
            "memory_ratio": (peaks["trained"] - peaks["nothing"])
            / (peaks["float"] - peaks["nothing"]),
            "peak_ratio": peaks["trained"] / peaks["float"],
        }
        print(name, found[name])
    return found


def peak_of(name: str, kind: str) -> int:
    """Peak memory of a process that makes three steps, KiB; of `nothing`: that has the model."""
    command = [sys.executable, __file__, "peak", "--network", name, "--kind", kind]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def run_peak(options: argparse.Namespace) -> None:
    """In a process of its own: prints its peak memory."""
    model, x = networks()[options.network]
    with tempfile.TemporaryDirectory() as folder:
        if options.kind == "trained":
            model = create(model, x, Path(folder))
        if options.kind != "nothing":
            step = stepper(model, x)
            for _ in range(3):
                step()
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(status.split("VmHWM:")[1].split()[0])


def run_steady(options: argparse.Namespace) -> dict[str, Any]:
    """Resident MiB after so many steps, of both ways to train."""
    found: dict[str, Any] = {}
    for kind in ("whole model", "operators"):
        command = [sys.executable, __file__, "steps", "--kind", kind]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[kind] = json.loads(shown.strip().splitlines()[-1])
        print(kind, found[kind], flush=True)
    return found


def run_steps(options: argparse.Namespace) -> None:
    """In a process of its own: trains 3000 steps, evaluates now and then, prints its sizes."""
    from fashion_mnist import resnet
    from qat import operators

    torch.manual_seed(0)
    x = torch.randn(8, 1, 28, 28)
    sizes = {}
    with tempfile.TemporaryDirectory() as name:
        whole = options.kind == "whole model"
        model = create(resnet(4), x, Path(name)) if whole else operators(resnet(4), 8)
        step = stepper(model, x)
        for done in range(1, 3001):
            step()
            if done % 100 == 0:
                model.eval()
                with torch.no_grad():
                    model(x)
                model.train()
            if done in (500, 1000, 2000, 3000):
                status = Path("/proc/self/status").read_text()
                sizes[done] = int(status.split("VmRSS:")[1].split()[0]) / 1024
    print(json.dumps(sizes))


def create(model: nn.Module, x: Tensor, folder: Path, cfg: str | None = None) -> nn.Module:
    """The model to train, with the config that a .cfg gives."""
    if cfg is not None:
        (folder / "retrain.cfg").write_text(cfg)
    amct.create_quant_retrain_config(
        folder / "retrain.json", model, x, None if cfg is None else folder / "retrain.cfg"
    )
    return amct.create_quant_retrain_model(folder / "retrain.json", model, folder / "record.txt", x)


# --- EfficientNet-Lite0 ------------------------------------------------------------------------


def train_quantized_layers_only(model: nn.Module) -> None:
    """Training mode for what learns: 32 images are too few for BatchNorm's statistics, and a
    teacher's logits do not go with dropped connections."""
    model.eval()
    for layer in retrain_layers(model).values():
        layer.train()


def match_means(model: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Takes the mean error that quantization makes out of the BatchNorms' biases.

    One pass of the float network and one of the quantized one, in which each layer already sees
    what the layers before it became. Post-training quantization does the same; training finds
    it too, but not in a hundred steps.

    Args:
        model: the network to train, its ranges known; changed.
        teacher: the float network.
        images: calibration images.
    """
    names = [name for name, part in teacher.named_modules() if isinstance(part, nn.BatchNorm2d)]
    means: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, y: means.update({name: y.mean((0, 2, 3))})

    def correct(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(norm: nn.Module, _: Any, y: Tensor) -> Tensor:
            shift = means[name] - y.mean((0, 2, 3))
            norm.bias.add_(shift)
            return y + shift[:, None, None]

        return hook

    for network, make in ((teacher, note), (model, correct)):
        network.eval()
        hooks = [network.get_submodule(n).register_forward_hook(make(n)) for n in names]
        with torch.no_grad():
            network(images)
        for hook in hooks:
            hook.remove()


def run_lite0(options: argparse.Namespace) -> dict[str, Any]:
    """SQNR of logits on held-out crops: post-training quantization, and after 100 steps."""
    from fidelity import sqnr_db
    from real_models import (
        calibration_crops,
        efficientnet_lite0,
        heldout_crops,
        training_crops,
    )

    images, held = calibration_crops().images, heldout_crops(views=options.views).images
    teacher = efficientnet_lite0()
    result: dict[str, Any] = {
        "steps": options.steps,
        "rate": options.rate,
        "others": options.others,
        "clips": options.clips,
    }

    def logits(model: nn.Module) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part) for part in held.split(8)]).numpy()

    reference = logits(teacher)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        amct.create_quant_config(folder / "c.json", teacher, images[:8], batch_num=4)
        calibrated = amct.quantize_model(
            folder / "c.json", folder / "m.onnx", folder / "r.txt", teacher, images[:8]
        )
        with torch.no_grad():
            for part in images.split(8):
                calibrated(part)
        result["post-training, dB"] = sqnr_db(reference, logits(calibrated))
        print(result)
        model = create(teacher, images[:8], folder, "batch_num: 4 retrain_data_quant_config { }")
        train_quantized_layers_only(model)
        with torch.no_grad():
            for part in images.split(8):
                model(part)
        result["before training, dB"] = sqnr_db(reference, logits(model))
        match_means(model, teacher, images)
        result["means matched, dB"] = sqnr_db(reference, logits(model))
        print(result)
        # Adam moves every value by the rate: too much for weights that a thousand inputs meet.
        named = dict(model.named_parameters())
        clips = [p for name, p in named.items() if "quantizer.clip" in name and p.requires_grad]
        weights = [p for p in named.values() if p.dim() > 1]
        biases = [p for name, p in named.items() if p.dim() == 1 and "quantizer" not in name]
        groups = [
            {"params": weights},
            {"params": biases, "lr": options.others * options.rate},
            {"params": clips, "lr": options.clips * options.rate},
        ]
        optimizer = torch.optim.Adam(groups, options.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        train_quantized_layers_only(model)
        began = time.process_time()
        # One crop of each photo a step, none of them twice.
        for step, part in enumerate(training_crops(options.steps).images.split(8)):
            with torch.no_grad():
                target = teacher(part)
            optimizer.zero_grad()
            loss = (model(part) - target).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                print(step, loss.item(), flush=True)
        result["training_cpu_s"] = time.process_time() - began
        result["trained, dB"] = sqnr_db(reference, logits(model))
        print(result)
        amct.save_quant_retrain_model(
            folder / "retrain.json", model, folder / "record.txt", folder / "net", images[:8]
        )
        from ort_sessions import cpu_session, run_batches

        written = run_batches(cpu_session(folder / "net_fake_quant_model.onnx"), held.numpy())
        result["fake-quant file, dB"] = sqnr_db(reference, written)
    return result


# --- Fashion-MNIST -----------------------------------------------------------------------------


def run_fashion(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy: float, post-training and trained, int8 and int4, and of the files."""
    from train_quantized import run

    return {
        f"int{bits}": {
            "images": options.images,
            "width": options.width,
            **run(bits, options.images, options.rate, options.width, options.epochs),
        }
        for bits in options.bits
    }


def run_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy after the same batches on one process and, halved, on two."""
    found: dict[str, Any] = {"images": options.images, "width": options.width}
    for processes in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            str(EXAMPLES / "train_quantized.py"),
            f"--images={options.images}",
            f"--width={options.width}",
            f"--epochs={options.epochs}",
            "--no-export",
        ]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[str(processes)] = json.loads(shown.strip().splitlines()[-1])
    return found


def main() -> None:
    """Runs one of the parts and adds it to the results."""
    parts = {
        "costs": run_costs,
        "steady": run_steady,
        "lite0": run_lite0,
        "fashion": run_fashion,
        "processes": run_processes,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*parts, "peak", "steps"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network")
    parser.add_argument("--kind")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--others", type=float, default=30, help="rate of biases, of the weights'")
    parser.add_argument("--clips", type=float, default=100, help="likewise, of clip values")
    parser.add_argument("--images", type=int, default=60000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3, help="of the float network")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    options = parser.parse_args()
    if options.rate is None:
        options.rate = 1e-5 if options.part == "lite0" else 0.02
    torch.set_num_threads(1)
    if options.part in ("peak", "steps"):
        (run_peak if options.part == "peak" else run_steps)(options)
        return
    found = parts[options.part](options)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = describe()
    results[options.part] = found
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results[options.part], indent=2))


if __name__ == "__main__":
    main()
