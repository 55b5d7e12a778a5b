"""Channel pruning of a small residual network: half of the FLOPs go, one epoch brings it back.

The network and the images are those of `fashion_mnist.py`; trained once, it is read from there
afterwards. Writes ``outputs/prune_channels/``: the config, the record, the checkpoint and both
ONNX models, which are equal (nothing is quantized).

    python examples/prune_channels.py
    python examples/prune_channels.py --ratio 0.5 --images 12800
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import fashion_mnist
import numpy as np
import onnxruntime
import torch
from torch import nn

import amct_pytorch as amct

OUTPUTS = Path("outputs") / "prune_channels"
CFG = """\
# {ratio} of the output channels of every Conv2d and Linear, and of what hangs together with them.
prune_config {{
  filter_pruner {{
    balanced_l2_norm_filter_prune {{
      prune_ratio: {ratio}
      ascend_optimized: {ascend}
    }}
  }}
}}
"""


def milliseconds(file: Path, batch: np.ndarray, rounds: int = 30) -> float:
    """The least time of one run of an ONNX model on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        session.run(None, {"images": batch})
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def onnx_file(model: nn.Module, batch: torch.Tensor, file: Path) -> Path:
    """The float model as ONNX."""
    torch.onnx.export(
        model, (batch,), file, input_names=["images"], output_names=["logits"], dynamo=True,
        verbose=False,
    )  # fmt: skip
    return file


def main() -> None:
    """Prunes, trains, saves, restores and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the channels")
    parser.add_argument("--ascend", action="store_true", help="keep multiples of 16 channels")
    parser.add_argument("--images", type=int, default=60000, help="to train on for one epoch")
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    model = fashion_mnist.trained()
    test = fashion_mnist.load("t10k")
    images, labels = (part[: args.images] for part in fashion_mnist.load("train"))
    batch = test[0][:1]

    cfg, record = OUTPUTS / "prune.cfg", OUTPUTS / "record.txt"
    cfg.write_text(CFG.format(ratio=args.ratio, ascend=str(args.ascend).lower()))
    began = time.perf_counter()
    pruned = amct.create_prune_retrain_model(model, batch, cfg, record)
    print(f"pruned in {time.perf_counter() - began:.2f} s")
    float_accuracy = fashion_mnist.accuracy(model, *test)
    before = fashion_mnist.accuracy(pruned, *test)

    torch.manual_seed(0)
    fashion_mnist.train(pruned, images, labels, args.rate)
    torch.save({"model": pruned.state_dict()}, OUTPUTS / "trained.pth")

    # In another process, say: the structure comes from the record.
    restored = amct.restore_prune_retrain_model(
        model, batch, record, cfg, OUTPUTS / "trained.pth", "model"
    )
    after = fashion_mnist.accuracy(restored, *test)
    amct.save_prune_retrain_model(restored, OUTPUTS / "net", batch, ["images"], ["logits"])
    float_file = onnx_file(model, batch, OUTPUTS / "float.onnx")
    times = [
        milliseconds(file, batch.numpy())
        for file in (float_file, OUTPUTS / "net_deploy_model.onnx")
    ]
    print(f"accuracy: float {float_accuracy:.2f} %, pruned {before:.2f} %, trained {after:.2f} %")
    print(f"ONNX Runtime: {times[0]:.3f} -> {times[1]:.3f} ms (x {times[0] / times[1]:.2f})")


if __name__ == "__main__":
    main()
