"""Half of the FLOPs go and int8 comes, in one training: a file an eighth of the float one's size.

The network and the images are those of `fashion_mnist.py`; trained once, it is read from there
afterwards. Writes ``outputs/prune_and_quantize/``: the config, the record with both parts, the
checkpoint, both ONNX models and the ledger.

    python examples/prune_and_quantize.py --images 20000
    python examples/prune_and_quantize.py --sparsity two_of_four
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fashion_mnist
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

import amct_pytorch as amct

OUTPUTS = Path("outputs") / "prune_and_quantize"
SPARSITY = {
    "channels": "filter_pruner { balanced_l2_norm_filter_prune "
    "{ prune_ratio: 0.3 ascend_optimized: false } }",
    "two_of_four": "n_out_of_m_pruner { l1_selective_prune { update_freq: 0 } }",
}
CFG = """\
prune_config {{ {sparsity} }}
retrain_data_quant_config {{ ulq_quantize {{ }} }}
retrain_weight_quant_config {{ arq_retrain {{ }} }}
"""


def zeros_in(file: Path) -> float:
    """Share of zeros among the int8 weights of a deploy model."""
    model = onnx.load(file)
    weights = [
        numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    ]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)


def run(sparsity: str = "channels", count: int = 60000, rate: float = 0.05) -> dict[str, Any]:
    """Compresses, trains, saves, restores and measures.

    Args:
        sparsity: a key of `SPARSITY`.
        count: of images to train on, for one epoch.
        rate: highest learning rate.
    """
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    model = fashion_mnist.trained()
    test = fashion_mnist.load("t10k")
    images, labels = (part[:count] for part in fashion_mnist.load("train"))
    batch = images[:8]
    found: dict[str, Any] = {"images": len(images), "float": fashion_mnist.accuracy(model, *test)}

    cfg, record = OUTPUTS / "compress.cfg", OUTPUTS / "record.txt"
    cfg.write_text(CFG.format(sparsity=SPARSITY[sparsity]))
    began = time.process_time()
    trained = amct.create_compressed_retrain_model(model, batch, cfg, record)
    found["create_cpu_s"] = time.process_time() - began
    began = time.process_time()
    fashion_mnist.train(trained, images, labels, rate)
    found["epoch_cpu_s"] = time.process_time() - began
    torch.save(trained.state_dict(), OUTPUTS / "trained.pth")

    # In another process, say: the structure comes from the record, ranges from the checkpoint.
    restored = amct.restore_compressed_retrain_model(
        model, batch, cfg, record, OUTPUTS / "trained.pth"
    ).eval()
    amct.save_compressed_retrain_model(
        restored, record, OUTPUTS / "net", batch, ["images"], ["logits"], {"images": {0: "n"}}
    )
    session = onnxruntime.InferenceSession(
        OUTPUTS / "net_fake_quant_model.onnx", providers=["CPUExecutionProvider"]
    )

    def in_runtime(part: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": part.numpy()})[0])

    found["compressed"] = fashion_mnist.accuracy(in_runtime, *test)
    # The deploy model's own integer arithmetic, on a part of the images.
    deployed = amct.DeploySession(OUTPUTS / "net_deploy_model.onnx")
    part = test[0][:500]
    (logits,) = deployed.run(None, {"images": part.numpy()})
    same = torch.from_numpy(logits).argmax(1) == in_runtime(part).argmax(1)
    found["deploy_agreement"] = float(same.float().mean())

    float_file, deploy_file = OUTPUTS / "float.onnx", OUTPUTS / "net_deploy_model.onnx"
    torch.onnx.export(model, (batch,), float_file, dynamo=True, verbose=False, external_data=False)
    found["bytes"] = [file.stat().st_size for file in (float_file, deploy_file)]
    found["zeros"] = zeros_in(deploy_file)
    ledger = json.loads((OUTPUTS / "net_ledger.json").read_text())
    found["notes"] = ledger["notes"]
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", choices=SPARSITY, default="channels")
    parser.add_argument("--images", type=int, default=60000, help="to train on for one epoch")
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = run(args.sparsity, args.images, args.rate)
    print("\n".join(found["notes"]))
    before, after = found["bytes"]
    print(
        f"accuracy: float {found['float']:.2f} %, compressed {found['compressed']:.2f} % "
        f"({found['compressed'] - found['float']:+.2f} points; fake-quant file in ONNX Runtime)"
    )
    print(f"same class by the deploy model: {100 * found['deploy_agreement']:.1f} % of 500 images")
    print(f"file: {before} -> {after} bytes (x {after / before:.3f})")
    print(f"zeros among its int8 weights: {100 * found['zeros']:.1f} %")
    print(f"CPU: created in {found['create_cpu_s']:.1f} s, epoch {found['epoch_cpu_s']:.0f} s")


if __name__ == "__main__":
    main()
