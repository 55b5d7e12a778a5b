"""Four-bit weights and activations for a small residual network, from 512 unlabelled images.

Post-training quantization to so few bits loses a lot; block-wise distillation takes minutes and
needs no labels. Prints the accuracy of the float network, of the quantized one before and after
distillation, and of the files that are written.

    python examples/distill_fashion_mnist.py [--images 512] [--epochs 3] [--bits 4]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from fashion_mnist import accuracy, load, trained
from ort_sessions import cpu_session

import amct_pytorch as amct

FOLDER = Path("outputs") / "distill_fashion_mnist"
BATCH = 32
DEFINITION = """
batch_num: 4
group_size: 1
distill_data_quant_config {{ ulq_quantize {{ dst_type: INT{bits} }} }}
distill_weight_quant_config {{ arq_distill {{ dst_type: INT{bits} }} }}
"""


def main() -> None:
    """Distill, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    settings = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = trained()
    images, labels = load("t10k")
    batches = load("train")[0][: settings.images].split(BATCH)

    definition, config = FOLDER / "distill.cfg", FOLDER / "distill.json"
    definition.write_text(DEFINITION.format(bits=settings.bits))
    amct.create_distill_config(config, model, batches[0], definition)
    student = amct.create_distill_model(config, model, batches[0])
    plain = amct.distill(model, student, config, batches, epochs=0)
    began = time.process_time()
    distilled = amct.distill(model, student, config, batches, epochs=settings.epochs)
    seconds = time.process_time() - began
    for block in distilled.outcomes:
        print(
            f"block {', '.join(block.layers)}: loss {block.loss_before:.3g} -> "
            f"{block.loss_after:.3g}"
        )
    amct.save_distill_model(
        distilled,
        FOLDER / "net",
        batches[0],
        FOLDER / "record.txt",
        ["image"],
        ["logits"],
        {"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    session = cpu_session(FOLDER / "net_fake_quant_model.onnx")

    def saved(part: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"image": part.numpy()})[0])

    for what, network in (
        ("float", model),
        (f"{settings.bits} bits, post-training", plain),
        (f"{settings.bits} bits, distilled", distilled),
        ("its fake-quant file, ONNX Runtime", saved),
    ):
        print(f"{what:34} {accuracy(network, images, labels):.2f} %")
    print(f"distillation took {seconds:.0f} CPU s")


if __name__ == "__main__":
    main()
