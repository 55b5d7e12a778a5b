"""Search for each layer's share of channels to prune, beside one share for all layers.

The network and the images are those of `fashion_mnist.py`; trained once, it is read from there
afterwards. Both prunings remove the same FLOPs and are trained alike. Writes
``outputs/search_pruning/``: the configs, the ledger of the search, the records.

    python examples/search_pruning.py --images 20000
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
from torch import Tensor, nn

import amct_pytorch as amct

OUTPUTS = Path("outputs") / "search_pruning"
UNIFORM = """\
prune_config {{
  filter_pruner {{
    balanced_l2_norm_filter_prune {{ prune_ratio: {ratio} ascend_optimized: false }}
  }}
}}
"""
SEARCH = """\
compress_ratio: {ratio}
ascend_optimized: false
test_iteration: {samples}
max_prune_ratio: {largest}
"""


def macs(model: nn.Module, batch: Tensor) -> int:
    """Multiply-accumulates of all convolutions and linear layers on one image."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += output[0].numel() * weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return total


def run(
    ratio: float = 0.3,
    samples: int = 64,
    largest: float = 1.0,
    count: int = 60000,
    rate: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Prunes uniformly, searches for the same FLOPs, trains both alike and measures.

    Args:
        ratio: share of the channels of every layer that goes, uniformly.
        samples: to measure sensitivity on.
        largest: share of a layer's channels that the search may take.
        count: of images to train on, for one epoch.
        rate: highest learning rate.
        seed: of the order of the images.
    """
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    model = fashion_mnist.trained()
    test = fashion_mnist.load("t10k")
    images, labels = (part[:count] for part in fashion_mnist.load("train"))
    batch = test[0][:1]
    found: dict[str, Any] = {"images": len(images), "float": fashion_mnist.accuracy(model, *test)}

    uniform = OUTPUTS / "uniform.cfg"
    uniform.write_text(UNIFORM.format(ratio=ratio))
    pruned = {"uniform": amct.create_prune_retrain_model(model, batch, uniform, OUTPUTS / "u.txt")}
    whole = macs(model, batch)
    fewer = whole / macs(pruned["uniform"].eval(), batch)

    config, cfg = OUTPUTS / "search.cfg", OUTPUTS / "found.cfg"
    config.write_text(SEARCH.format(ratio=round(fewer, 4), samples=samples, largest=largest))
    one_hot = nn.functional.one_hot(labels[:samples], 10).float()
    began = time.process_time()
    amct.auto_channel_prune_search(model, config, [images[:samples], one_hot], cfg)
    found["search_cpu_s"] = time.process_time() - began
    pruned["searched"] = amct.create_prune_retrain_model(model, batch, cfg, OUTPUTS / "s.txt")
    ledger = json.loads((OUTPUTS / "found_ledger.json").read_text())
    found["compress_ratio"] = ledger["compress_ratio"]
    found["layers"] = {layer["name"]: layer["channels"] for layer in ledger["layers"]}

    for name, network in pruned.items():
        figures = {"macs_ratio": whole / macs(network.eval(), batch)}
        figures["untrained"] = fashion_mnist.accuracy(network, *test)
        began = time.process_time()
        fashion_mnist.train(network, images, labels, rate, seed=seed)
        figures["epoch_cpu_s"] = time.process_time() - began
        figures["trained"] = fashion_mnist.accuracy(network, *test)
        found[name] = figures
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3, help="share of channels, uniform")
    parser.add_argument("--largest", type=float, default=1.0, help="share of a layer's channels")
    parser.add_argument("--samples", type=int, default=64, help="to measure sensitivity on")
    parser.add_argument("--images", type=int, default=60000, help="to train on for one epoch")
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = run(args.ratio, args.samples, args.largest, args.images, args.rate, args.seed)
    for name, (before, after) in found["layers"].items():
        print(f"{name:>14}: {before:4} -> {after:4} channels")
    asked, reached = found["compress_ratio"]
    seconds = found["search_cpu_s"]
    print(f"searched in {seconds:.1f} CPU s; ratio {asked:.3f} asked for, {reached:.3f} reached")
    print(f"float: {found['float']:.2f} %")
    for name in ("uniform", "searched"):
        figures = found[name]
        print(
            f"{name}: {figures['macs_ratio']:.3f} times fewer MACs, {figures['untrained']:.2f} %, "
            f"trained {figures['trained']:.2f} %"
        )


if __name__ == "__main__":
    main()
