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


def main() -> None:
    """Prunes uniformly, searches for the same FLOPs, trains both and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.29, help="share of channels, uniform")
    parser.add_argument("--largest", type=float, default=0.7, help="share of a layer's channels")
    parser.add_argument("--samples", type=int, default=64, help="to measure sensitivity on")
    parser.add_argument("--images", type=int, default=60000, help="to train on for one epoch")
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    model = fashion_mnist.trained()
    test = fashion_mnist.load("t10k")
    images, labels = (part[: args.images] for part in fashion_mnist.load("train"))
    batch = test[0][:1]

    uniform = OUTPUTS / "uniform.cfg"
    uniform.write_text(UNIFORM.format(ratio=args.ratio))
    pruned = {"uniform": amct.create_prune_retrain_model(model, batch, uniform, OUTPUTS / "u.txt")}
    whole = macs(model, batch)
    ratio = whole / macs(pruned["uniform"].eval(), batch)

    config, found = OUTPUTS / "search.cfg", OUTPUTS / "found.cfg"
    config.write_text(
        SEARCH.format(ratio=round(ratio, 4), samples=args.samples, largest=args.largest)
    )
    one_hot = nn.functional.one_hot(labels[: args.samples], 10).float()
    began = time.perf_counter()
    data = [images[: args.samples], one_hot]
    amct.auto_channel_prune_search(model, config, data, found)
    seconds = time.perf_counter() - began
    pruned["searched"] = amct.create_prune_retrain_model(model, batch, found, OUTPUTS / "s.txt")
    ledger = json.loads((OUTPUTS / "found_ledger.json").read_text())
    for layer in ledger["layers"]:
        before, after = layer["channels"]
        print(f"{layer['name']:>14}: {before:4} -> {after:4} channels  {layer['reason'] or ''}")
    asked, reached = ledger["compress_ratio"]
    print(f"searched in {seconds:.1f} s; ratio {asked:.3f} asked for, {reached:.3f} reached")

    print(f"float: {fashion_mnist.accuracy(model, *test):.2f} %")
    for name, network in pruned.items():
        fewer = whole / macs(network.eval(), batch)
        before = fashion_mnist.accuracy(network, *test)
        fashion_mnist.train(network, images, labels, args.rate)
        after = fashion_mnist.accuracy(network, *test)
        print(f"{name}: {fewer:.3f} times fewer MACs, {before:.2f} %, trained {after:.2f} %")


if __name__ == "__main__":
    main()
