"""The whole way from a float network to its simulated and its deployed form, for the examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ort_sessions import cpu_options
from torch import Tensor, nn

import amct_pytorch as amct


class Deployed(nn.Module):
    """A deploy model as a module: tensors in by position, its first output out."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._session = amct.DeploySession(file, cpu_options())
        self._names = [entry.name for entry in self._session.get_inputs()]

    def forward(self, *tensors: Tensor) -> Tensor:
        """Run the session."""
        feeds = {name: t.numpy() for name, t in zip(self._names, tensors, strict=True)}
        return torch.from_numpy(self._session.run(None, feeds)[0])


@dataclass(frozen=True)
class Quantized:
    """What quantization made of a network."""

    simulated: nn.Module
    folder: Path

    def deployed(self) -> Deployed:
        """The deploy model on the toolkit's own exact integers."""
        return Deployed(self.folder / "net_deploy_model.onnx")

    def summary(self) -> str:
        """How many of its layers are on integers."""
        layers = json.loads((self.folder / "net_ledger.json").read_text())["layers"]
        quantized = sum(layer["status"] == "quantized" for layer in layers)
        return f"{quantized} of {len(layers)} layers with weights in int8"


def quantize(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    folder: Path,
    input_names: list[str],
    dynamic_axes: dict[str, dict[int, str]] | None = None,
    activation_params: Mapping[str, Any] | None = None,
) -> Quantized:
    """Calibrate on `batches`, write all files to `folder`.

    `activation_params` go into the config's activation_quant_params of every layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, record = folder / "config.json", folder / "record.txt"
    modified = folder / "modified.onnx"
    amct.create_quant_config(config, model, batches[0], batch_num=len(batches))
    if activation_params:
        _edit(config, activation_params)
    simulated = amct.quantize_model(
        config,
        modified,
        record,
        model,
        batches[0],
        input_names=input_names,
        output_names=["output"],
        dynamic_axes=dynamic_axes,
    )
    with torch.no_grad():
        for batch in batches:
            simulated(*batch)
    amct.save_model(modified, record, folder / "net")
    return Quantized(simulated, folder)


def _edit(config: Path, activation_params: Mapping[str, Any]) -> None:
    """Change how the input ranges of all layers are searched, as a user would in the file."""
    content = json.loads(config.read_text())
    for entry in content.values():
        if isinstance(entry, dict) and "activation_quant_params" in entry:
            entry["activation_quant_params"].update(activation_params)
    config.write_text(json.dumps(content, indent=4))
