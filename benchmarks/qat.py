"""Quantization-aware operators: what one training step costs beside the float one and beside peers.

    python benchmarks/qat.py            a ResNet-style network and an MLP, every contender
    python benchmarks/qat.py --bits 4

Each contender trains the same float network: SGD with momentum, one batch. CPU seconds of a step
are medians of steps taken in turns in one process; peak memory is what one process reaches above
another that only holds the model and has imported the same. Results go to `results/qat.json`.

torch's own QAT (torch.ao.quantization, eager mode) quantizes inputs and weights of Conv2d and
Linear; torchao's (torchao.quantization.qat) those of Linear only, inputs by token, so it takes part
in the MLP. torchao is used where it is installed: `python benchmarks/peers.py install torchao` and
then this script with that environment's Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from machine import SETTINGS, describe

os.environ.update(SETTINGS)  # before torch is imported

import torch
from torch import Tensor, nn
from training_step import stepper

from amct_pytorch.nn.module.quantization import Conv2dQAT, LinearQAT

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
RESULTS = Path(__file__).parent / "results" / "qat.json"
warnings.filterwarnings("ignore")


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Float networks, and the shape of a batch for each."""
    from fashion_mnist import resnet

    def mlp() -> nn.Module:
        widths = [512, 1024, 1024, 1024, 64]
        layers = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    return {
        "ResNet, 64 x 1 x 28 x 28": (resnet, (64, 1, 28, 28)),
        "MLP, 512 x 512": (mlp, (512, 512)),
    }


def plain(model: nn.Module, bits: int) -> nn.Module:
    """The float network."""
    return model


def operators(model: nn.Module, bits: int, algo: str = "arq_retrain") -> nn.Module:
    """Our operators in the place of torch's."""
    config = {
        "retrain_data_config": {"dst_type": f"INT{bits}", "fixed_min": None},
        "retrain_weight_config": {"dst_type": f"INT{bits}", "weights_retrain_algo": algo},
    }
    for name, child in model.named_children():
        if type(child) is nn.Conv2d:
            setattr(model, name, Conv2dQAT.from_float(child, config))
        elif type(child) is nn.Linear:
            setattr(model, name, LinearQAT.from_float(child, config))
        else:
            operators(child, bits, algo)
    return model


def learned(model: nn.Module, bits: int) -> nn.Module:
    """Our operators with learned weight scales."""
    return operators(model, bits, "ulq_retrain")


def torch_own(model: nn.Module, bits: int) -> nn.Module:
    """torch.ao.quantization in eager mode: moving averages, weights per channel."""
    from torch.ao.quantization import (
        FakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        QConfig,
        prepare_qat,
    )

    top = 2 ** (bits - 1)
    common = {"quant_min": -top, "quant_max": top - 1, "dtype": torch.qint8}
    model.train().qconfig = QConfig(
        FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **common),
        FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            qscheme=torch.per_channel_symmetric,
            **common,
        ),
    )
    return prepare_qat(torch.ao.quantization.QuantWrapper(model))


def torchao(model: nn.Module, bits: int) -> nn.Module:
    """torchao's fake quantization of Linear: inputs by token, weights by channel."""
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis, PerToken
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise NotImplementedError("Linear only")
    dtype = torch.int8 if bits == 8 else torch.int4
    activations = IntxFakeQuantizeConfig(dtype, PerToken(), is_symmetric=False)
    weights = IntxFakeQuantizeConfig(dtype, PerAxis(0))
    settings = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
    quantize_(model, settings)
    return model


CONTENDERS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "float": plain,
    "amct_pytorch, ARQ weights": operators,
    "amct_pytorch, ULQ weights": learned,
    "torch.ao.quantization": torch_own,
    "torchao": torchao,
}


def made(network: str, contender: str, bits: int) -> tuple[nn.Module, Tensor]:
    """A contender's network with a batch for it."""
    torch.manual_seed(0)
    build, shape = networks()[network]
    return CONTENDERS[contender](build(), bits), torch.randn(shape)


def measure(network: str, bits: int, rounds: int) -> dict[str, Any]:
    """Ratios to the float network, by contender; or why there are none."""
    found: dict[str, Any] = {}
    steps = {}
    for contender in CONTENDERS:
        try:
            model, x = made(network, contender, bits)
            steps[contender] = stepper(model, x)
            for _ in range(3):
                steps[contender]()
        except (ImportError, NotImplementedError) as error:
            steps.pop(contender, None)
            found[contender] = f"left out: {error}"
    seconds: dict[str, list[float]] = {contender: [] for contender in steps}
    for _ in range(rounds):
        for contender, step in steps.items():
            began = time.process_time()
            step()
            seconds[contender].append(time.process_time() - began)
    del steps
    base = median(seconds["float"])
    found["float"] = {"step_cpu_s": base}
    empty, full = peak_of(network, "float", bits, 0), peak_of(network, "float", bits, 4)
    for contender, times in seconds.items():
        if contender != "float":
            held = peak_of(network, contender, bits, 0)
            memory = (peak_of(network, contender, bits, 4) - held) / (full - empty)
            found[contender] = {"time": median(times) / base, "memory": memory}
    return found


def peak_of(network: str, contender: str, bits: int, steps: int) -> int:
    """Peak memory of a process that makes so many steps, KiB."""
    command = [sys.executable, __file__, "--peak", network, contender, str(bits), str(steps)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(shown.split()[-1])


def high_water() -> int:
    """Largest resident size of this process so far, KiB.

    Not ru_maxrss: a process that was forked starts from its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Measures everything, writes the results and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=[8, 4], default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        network, contender, bits, steps = options.peak
        step = stepper(*made(network, contender, int(bits)))
        for _ in range(int(steps)):
            step()
        print(high_water())
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = describe()
    part = results[f"int{options.bits}"] = {}
    for network in networks():
        part[network] = measure(network, options.bits, options.rounds)
        print(f"\n| {network}, int{options.bits} | step, of float | peak memory, of float |")
        print("| --- | --- | --- |")
        for contender, row in part[network].items():
            if contender != "float":
                cells = (
                    (row, "")
                    if isinstance(row, str)
                    else (f"{row[k]:.2f}" for k in ("time", "memory"))
                )
                print(f"| {contender} | {' | '.join(cells)} |")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
