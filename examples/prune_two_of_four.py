"""2:4 sparsity of a small residual network: of each four weights two go, a short training follows.

The network and the images are those of `fashion_mnist.py`; trained once, it is read from there
afterwards. Writes ``outputs/two_of_four/``: the config, the record, the checkpoint, both ONNX
models (equal: nothing is quantized) and the ledger.

    python examples/prune_two_of_four.py --images 20000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import fashion_mnist
import numpy as np
import onnx
import torch
from onnx import numpy_helper

import amct_pytorch as amct

OUTPUTS = Path("outputs") / "two_of_four"
CFG = """\
# Two of each four weights along the input channels, selected anew every {frequency} batches.
prune_config {{
  n_out_of_m_pruner {{ l1_selective_prune {{ n_out_of_m_type: M4N2 update_freq: {frequency} }} }}
}}
"""


def zeros_of(file: Path) -> dict[str, float]:
    """Share of zeros of each convolution's and linear layer's weight in an ONNX file."""
    model = onnx.load(file)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return {node.input[1]: float(np.mean(held[node.input[1]] == 0)) for node in layers}


def run(frequency: int = 0, count: int = 60000, rate: float = 0.02) -> dict[str, Any]:
    """Makes the network sparse, trains, saves, restores and measures.

    Args:
        frequency: batches between selections of the weights that stay; 0: only the first selects.
        count: of images to train on, for one epoch.
        rate: highest learning rate.
    """
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    model = fashion_mnist.trained()
    test = fashion_mnist.load("t10k")
    images, labels = (part[:count] for part in fashion_mnist.load("train"))
    batch = test[0][:1]
    found: dict[str, Any] = {"images": len(images), "float": fashion_mnist.accuracy(model, *test)}

    cfg, record = OUTPUTS / "prune.cfg", OUTPUTS / "record.txt"
    cfg.write_text(CFG.format(frequency=frequency))
    began = time.process_time()
    sparse = amct.create_prune_retrain_model(model, batch, cfg, record)
    found["create_cpu_s"] = time.process_time() - began
    found["untrained"] = fashion_mnist.accuracy(sparse, *test)

    began = time.process_time()
    fashion_mnist.train(sparse, images, labels, rate)
    found["epoch_cpu_s"] = time.process_time() - began
    torch.save({"model": sparse.state_dict()}, OUTPUTS / "trained.pth")

    # In another process, say: masks and counters come with the checkpoint.
    restored = amct.restore_prune_retrain_model(
        model, batch, record, cfg, OUTPUTS / "trained.pth", "model"
    )
    found["trained"] = fashion_mnist.accuracy(restored, *test)
    amct.save_prune_retrain_model(restored, OUTPUTS / "net", batch, ["images"], ["logits"])
    found["zeros"] = zeros_of(OUTPUTS / "net_deploy_model.onnx")
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frequency", type=int, default=0, help="batches between selections")
    parser.add_argument("--images", type=int, default=60000, help="to train on for one epoch")
    parser.add_argument("--rate", type=float, default=0.02, help="highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = run(args.frequency, args.images, args.rate)
    for name, share in found["zeros"].items():
        print(f"{name:>24}: {100 * share:.1f} % zeros")
    print(
        f"accuracy: float {found['float']:.2f} %, 2:4 {found['untrained']:.2f} %, trained "
        f"{found['trained']:.2f} % ({found['trained'] - found['float']:+.2f} points)"
    )
    print(f"CPU: made sparse in {found['create_cpu_s']:.1f} s, epoch {found['epoch_cpu_s']:.0f} s")


if __name__ == "__main__":
    main()
