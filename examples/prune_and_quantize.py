"""Half of the FLOPs go and int8 comes, in one training: a file an eighth of the float one's size.

The network and the images are those of `fashion_mnist.py`; trained once, it is read from there
afterwards. Writes ``outputs/prune_and_quantize/``: the config, the record with both parts, the
checkpoint, both ONNX models and the ledger.

    python examples/prune_and_quantize.py --images 20000
    python examples/prune_and_quantize.py --sparsity two_of_four
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fashion_mnist
import onnxruntime
import torch
from torch import Tensor

import amct_pytorch as amct

OUTPUTS = Path("outputs") / "prune_and_quantize"
SPARSITY = {
    "channels": "filter_pruner { balanced_l2_norm_filter_prune "
    "{ prune_ratio: 0.29 ascend_optimized: false } }",
    "two_of_four": "n_out_of_m_pruner { l1_selective_prune { update_freq: 0 } }",
}
CFG = """\
prune_config {{ {sparsity} }}
retrain_data_quant_config {{ ulq_quantize {{ }} }}
retrain_weight_quant_config {{ arq_retrain {{ }} }}
"""


def main() -> None:
    """Compresses, trains, saves, restores and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", choices=SPARSITY, default="channels")
    parser.add_argument("--images", type=int, default=60000, help="to train on for one epoch")
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    model = fashion_mnist.trained()
    test = fashion_mnist.load("t10k")
    images, labels = (part[: args.images] for part in fashion_mnist.load("train"))
    batch = images[:8]

    cfg, record = OUTPUTS / "compress.cfg", OUTPUTS / "record.txt"
    cfg.write_text(CFG.format(sparsity=SPARSITY[args.sparsity]))
    trained = amct.create_compressed_retrain_model(model, batch, cfg, record)
    fashion_mnist.train(trained, images, labels, args.rate)
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

    float_file = OUTPUTS / "float.onnx"
    torch.onnx.export(model, (batch,), float_file, dynamo=True, verbose=False, external_data=False)
    sizes = [file.stat().st_size for file in (float_file, OUTPUTS / "net_deploy_model.onnx")]
    print(
        f"accuracy: float {fashion_mnist.accuracy(model, *test):.2f} %, compressed "
        f"{fashion_mnist.accuracy(in_runtime, *test):.2f} % (fake-quant file in ONNX Runtime)"
    )
    print(f"file: {sizes[0]} -> {sizes[1]} bytes (x {sizes[1] / sizes[0]:.3f})")


if __name__ == "__main__":
    main()
