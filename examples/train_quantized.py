"""Quantization-aware training: a small ResNet on Fashion-MNIST, from config to deployed accuracy.

    python examples/train_quantized.py                 int8
    python examples/train_quantized.py --bits 4        weights and inputs of four bits
    torchrun --nproc_per_node=2 examples/train_quantized.py

Trains the float network first (once, see fashion_mnist.py), then one epoch more with quantized
layers. Files go to `outputs/train_quantized/`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path

# Read once, when torch starts: one thread, which does not burn its core while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from fashion_mnist import accuracy, load, train, trained
from ort_sessions import cpu_session
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import amct_pytorch as amct

FOLDER = Path("outputs") / "train_quantized"
CFG = """batch_num: 4
retrain_data_quant_config {{ ulq_quantize {{ dst_type: INT{bits} }} }}
retrain_weight_quant_config {{ arq_retrain {{ dst_type: INT{bits} }} }}
"""


def observed(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose ranges are known and whose weights are not trained: post-training."""
    copied = copy.deepcopy(model).train()
    for module in copied.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its statistics are those of the whole training
    with torch.no_grad():
        for part in images[:512].split(128):
            copied(part)
    return copied


def run(
    bits: int, number: int = 60000, rate: float = 0.02, width: int = 32, epochs: int = 3,
    export: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Accuracies in percent on the test images.

    Args:
        bits: of weights and inputs, 8 or 4.
        number: training images of the epoch with quantized layers.
        rate: its peak learning rate.
        width: of the network.
        epochs: of the float network.
        export: whether the files are written and run.
    """
    folder = FOLDER / f"int{bits}"
    folder.mkdir(parents=True, exist_ok=True)
    config, record = folder / "retrain.json", folder / "record.txt"
    first, many = True, dist.is_initialized()
    if many:
        first = dist.get_rank() == 0
        if not first:
            dist.barrier()  # the first process trains the float network, or has it
    float_model = trained(width, epochs)
    example = torch.zeros(2, 1, 28, 28)
    if first:
        (folder / "retrain.cfg").write_text(CFG.format(bits=bits))
        amct.create_quant_retrain_config(
            config, float_model, example, config_definition=folder / "retrain.cfg"
        )
    if many and first:
        dist.barrier()
    images, labels = (part[:number] for part in load("train"))
    test_images, test_labels = load("t10k")
    found = {"float": accuracy(float_model, test_images, test_labels)}

    model = amct.create_quant_retrain_model(config, float_model, record, example)
    if not many:
        found["post-training"] = accuracy(observed(model, images), test_images, test_labels)
    if many:
        whole = DistributedDataParallel(model)
        train_on_share(whole, images, labels, rate)
    else:
        train(model, images, labels, rate)
    found["trained"] = accuracy(model, test_images, test_labels)
    if export:
        amct.save_quant_retrain_model(
            config, model, record, folder / "net", example, ["image"], ["logits"],
            dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}},
        )  # fmt: skip
        if first:
            session = cpu_session(folder / "net_fake_quant_model.onnx")
            exact = amct.DeploySession(folder / "net_deploy_model.onnx")

            def by_file(part: Tensor) -> Tensor:
                return torch.from_numpy(session.run(None, {"image": part.numpy()})[0])

            found["fake-quant file"] = accuracy(by_file, test_images, test_labels)
            part = test_images[:200].numpy()
            deployed = exact.run(None, {"image": part})[0]
            same = deployed == session.run(None, {"image": part})[0]
            found["deployed logits equal to it"] = 100 * float(same.mean())
    return found


def train_on_share(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> None:
    """As `train`, each process with its part of each batch of 128."""
    rank, world = dist.get_rank(), dist.get_world_size()
    steps = len(images) // 128
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    chance = torch.Generator().manual_seed(0)  # the same in each process
    model.train()
    order = torch.randperm(len(images), generator=chance)
    for step in range(steps):
        chosen = order[step * 128 : (step + 1) * 128]
        mirrored = bool(torch.rand((), generator=chance) < 0.5)
        chosen = chosen[rank::world]
        batch = images[chosen].flip(3) if mirrored else images[chosen]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        model(images[:2])  # brings BatchNorm's statistics of all processes to the first one's


def main() -> None:
    """Prints the accuracies, and last all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8)
    parser.add_argument("--images", type=int, default=60000)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3, help="of the float network")
    parser.add_argument("--no-export", action="store_true")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    found = run(
        options.bits, options.images, options.rate, options.width, options.epochs,
        export=not options.no_export,
    )  # fmt: skip
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        for name, value in found.items():
            print(f"{name:32} {value:6.2f} %")
        print(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
