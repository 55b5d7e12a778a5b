"""A network in quantization-aware training, for the tests of its flow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.graph.tensors import tensors_in

INT4 = """retrain_data_quant_config { ulq_quantize { dst_type: INT4 } }
retrain_weight_quant_config { %s { dst_type: INT4 } }"""


def created(
    model: nn.Module, batch: Any, cfg: str | None = None, *, batch_num: int = 1, **changes: Any
) -> nn.Module:
    """The model to train; files are in the working directory.

    Args:
        model: the float model.
        batch: example inputs.
        cfg: text of a .cfg.
        batch_num: batches to observe.
        changes: keys of layers' JSON blocks that are set for all layers.
    """
    if cfg is not None:
        Path("retrain.cfg").write_text(cfg)
    given = None if cfg is None else "retrain.cfg"
    amct.create_quant_retrain_config("retrain.json", model, batch, config_definition=given)
    config = json.loads(Path("retrain.json").read_text())
    config["batch_num"] = batch_num
    for layer in (value for value in config.values() if isinstance(value, dict)):
        for block in (layer["retrain_data_config"], layer["retrain_weight_config"]):
            block.update({key: value for key, value in changes.items() if key in block})
    Path("retrain.json").write_text(json.dumps(config))
    return amct.create_quant_retrain_model("retrain.json", model, "record.txt", batch)


def loss_of(outputs: Any) -> Tensor:
    """A loss of whatever a model returns, that has a gradient everywhere."""
    return sum(((t - 0.3) ** 2).mean() for t in tensors_in(outputs) if t.is_floating_point())


def train(model: nn.Module, batches: Sequence[tuple[Tensor, ...]], rate: float = 0.01) -> None:
    """One step of SGD for each batch, without momentum."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model(*batch)).backward()
        optimizer.step()


def evaluated(model: nn.Module, batch: tuple[Tensor, ...]) -> list[np.ndarray]:
    """What the model returns in eval mode."""
    model.eval()
    with torch.no_grad():
        return [tensor.numpy() for tensor in tensors_in(model(*batch))]


def saved(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    """Saves the model under out/net; the ledger's layers by name."""
    amct.save_quant_retrain_model("retrain.json", model, "record.txt", "out/net", batch)
    ledger = json.loads(Path("out/net_ledger.json").read_text())
    return {entry["name"]: entry for entry in ledger["layers"]}


def run_files(batch: tuple[Tensor, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the fake-quant model and the deploy model under out/net return."""
    fake = onnx.load("out/net_fake_quant_model.onnx")
    names = [given.name for given in fake.graph.input]
    feeds = dict(zip(names, (tensor.numpy() for tensor in batch), strict=True))
    session = ort.InferenceSession(fake.SerializeToString(), providers=["CPUExecutionProvider"])
    deployed = amct.DeploySession("out/net_deploy_model.onnx")
    return session.run(None, feeds), deployed.run(None, feeds)


def network() -> nn.Sequential:
    """Convolution, BatchNorm and ReLU twice, dropout, Linear."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6 * 16, 5),
    )


def data(number: int = 6) -> list[tuple[Tensor]]:
    """Batches for `network`."""
    return [(torch.randn(3, 4, 8, 8),) for _ in range(number)]
