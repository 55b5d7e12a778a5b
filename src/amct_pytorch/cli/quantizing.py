"""What `amct quantize` does, once its options are known."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from amct_pytorch.cli.data import Data
from amct_pytorch.cli.data_options import named_as, opened
from amct_pytorch.cli.measure import Goals
from amct_pytorch.cli.models import FloatModel, check_against_runtime, float_model
from amct_pytorch.cli.qdq import qdq_path
from amct_pytorch.cli.staging import Staging
from amct_pytorch.errors import ArgumentValueError, ConfigError, ExportError
from amct_pytorch.files import read_text
from amct_pytorch.flows.outputs import output_path
from amct_pytorch.logs import start_logging
from amct_pytorch.report.ledger import Ledger, decibels

# Steps of AdaRound where --accuracy best asks for it, as benchmarks/best_settings.py measures it.
BEST_ITERATIONS = 200
# Timed calls of each model for the report.
REPORT_ROUNDS = 10


@dataclass(frozen=True)
class Request:
    """What the user asked for; see the options of `amct quantize`."""

    model: str
    data: dict[str, Any]
    out: Path | None
    batch_num: int | None
    most_batches: int
    config: Path | None
    skip: tuple[str, ...]
    symmetric: bool
    best: bool
    qdq: bool
    report: bool
    goals: Goals


@dataclass(frozen=True)
class Done:
    """What came of it.

    Attributes:
        ledger: of the calibration.
        files: that were written.
        document: for JSON.
        missed: goals that are not reached, in words.
    """

    ledger: Ledger
    files: list[Path]
    document: dict[str, Any]
    missed: list[str]


def quantize(request: Request, note: Callable[[str], None]) -> Done:
    """Quantizes a model; all files take their places together when everything is done.

    Args:
        request: what is asked for.
        note: told of each step.

    Raises:
        AmctError: something that was given is wrong; nothing is written then.
    """
    start_logging(to_file=False)
    if request.report:
        from amct_pytorch.report.html import check_installed

        check_installed()
    model = float_model(request.model)
    save_path = request.out or Path(f"{model.name}_int8") / model.name
    deploy = output_path(_text(save_path), "deploy", "--out")
    data, preprocessing = opened(request.data, model.inputs)
    number = _batch_number(request, data)
    note(f"model: {request.model}")
    note(f"data: {data}; calibrating on {number} batches")
    for text in data.notes:
        note(f"data: {text}")
    if len(data) > number:
        note(f"data: {len(data) - number} batches are not used (--batch-num takes more)")
    if preprocessing is not None:
        note(f"images: {preprocessing}")
    example = data.batch(0)
    same = check_against_runtime(model, example)
    if same is not None:
        note(f"ONNX read as torch module: agrees with ONNX Runtime to {same:.0f} dB")
    with Staging(deploy.parent) as staging:
        made = _Making(request, model, data, number, staging.path, deploy, note)
        ledger = made.run(example)
        if preprocessing is not None:
            made.path("preprocessing.json").write_text(preprocessing.to_json())
        if request.report:
            made.report()
        files, replaced = staging.publish(_external_files(deploy.parent, deploy.name))
    if replaced:
        note(f"replaced {len(replaced)} files of an earlier run in {deploy.parent}")
    missed = _missed(request.goals, ledger)
    document = {
        "model": request.model,
        "files": {_key(file): str(file) for file in files},
        "data": {"samples": data.samples, "batch_size": data.batch_size, "batch_num": number},
        "preprocessing": None if preprocessing is None else json.loads(preprocessing.to_json()),
        "agreement_with_onnxruntime_db": decibels(same),
        "layers": {
            "all": len(ledger.layers),
            "quantized": sum(entry.status == "quantized" for entry in ledger.layers),
            "float": {e.name: e.reason for e in ledger.layers if e.status != "quantized"},
        },
        "output": None if ledger.output is None else vars(ledger.output),
        "seconds": ledger.seconds,
        "bytes": ledger.bytes,
        "goals_missed": missed,
    }
    return Done(ledger, files, document, missed)


def _text(save_path: Path) -> str:
    return os.fspath(save_path)


def _batch_number(request: Request, data: Data) -> int:
    if request.batch_num is None:
        return min(len(data), request.most_batches)
    if request.batch_num > len(data):
        raise ArgumentValueError(
            f"--batch-num is {request.batch_num}; the data has {len(data)} batches of "
            f"{data.batch_size}"
        )
    return request.batch_num


def _key(file: Path) -> str:
    """What a file is, by its name: ``deploy_model``, ``ledger``, …"""
    for key in ("fake_quant_model", "deploy_model", "qdq_model", "modified_model"):
        if file.stem.endswith(key):
            return key
    for key in ("comparison", "config", "ledger", "preprocessing", "record", "report"):
        if file.stem.endswith(key):
            return key
    return file.name


def _external_files(folder: Path, deploy_name: str) -> set[str]:
    """External data of the models that this run replaces."""
    from amct_pytorch.export.onnx_file import data_files

    stem = deploy_name.removesuffix("deploy_model.onnx")
    kinds = ("deploy", "fake_quant", "modified", "qdq")
    return {name for kind in kinds for name in data_files(folder / f"{stem}{kind}_model.onnx")}


def _missed(goals: Goals, ledger: Ledger) -> list[str]:
    if not goals.any or ledger.output is None:
        return []
    found = ledger.output
    return goals.missed(
        found.sqnr_db, found.cosine, found.top1_agreement, "output on the last calibration batch"
    )


class _Making:
    """The flow's calls, in a folder of its own."""

    def __init__(
        self,
        request: Request,
        model: FloatModel,
        data: Data,
        number: int,
        folder: Path,
        deploy: Path,
        note: Callable[[str], None],
    ) -> None:
        self._request, self._model, self._data = request, model, data
        self._number, self._folder, self._note = number, folder, note
        self._prefix = deploy.name.removesuffix("deploy_model.onnx")

    def path(self, name: str) -> Path:
        """A file of this run."""
        return self._folder / f"{self._prefix}{name}"

    def run(self, example: tuple[Any, ...]) -> Ledger:
        """Config, calibration, files."""
        from amct_pytorch.export.qdq import deploy_to_qdq
        from amct_pytorch.flows.post_training import save_model

        inputs = tuple(torch.from_numpy(array) for array in example)
        config, record = self.path("config.json"), self.path("record.txt")
        modified = self.path("modified_model.onnx")
        self._write_config(config, inputs)
        self._note("looking at the network, writing the float ONNX")
        given = self._request.config
        with named_as(str(config), f"--config: {config.name if given is None else given}"):
            calibrated = self._calibration_model(config, modified, record, inputs)
        # disable=None: a bar on a terminal only.
        batches = tqdm(range(self._number), "calibrating", unit="batch", disable=None, leave=False)
        with torch.no_grad():
            for index in batches:
                calibrated(*map(torch.from_numpy, self._data.batch(index)))
        self._note("writing the quantized models")
        prefix = self._folder / self._prefix.removesuffix("_") if self._prefix else self._folder
        with contextlib.redirect_stdout(io.StringIO()):
            save_model(modified, record, str(prefix) + ("" if self._prefix else os.sep))
        deploy = self.path("deploy_model.onnx")
        if self._request.qdq:
            deploy_to_qdq(deploy, qdq_path(deploy))
        return Ledger.from_json(self.path("ledger.json").read_text())

    def _calibration_model(
        self, config: Path, modified: Path, record: Path, inputs: tuple[torch.Tensor, ...]
    ) -> nn.Module:
        """With all axes free that the model leaves free, else with the batch axis alone."""
        from amct_pytorch.flows.post_training import quantize_model

        model, axes = self._model, self._model.dynamic_axes or {}
        names = (model.input_names, model.output_names)
        try:
            return quantize_model(
                config, modified, record, model.module, inputs, *names, axes or None
            )
        except ExportError as error:
            only_batch = {name: {0: free[0]} for name, free in axes.items() if 0 in free}
            if only_batch == axes:
                raise
            fixed = sorted({f"{n}[{i}]" for n in model.input_names for i in axes.get(n, {}) if i})
            self._note(f"axes {', '.join(fixed)} cannot stay free: {error}")
            self._note("they get the data's sizes; only the batch axis stays free")
        return quantize_model(
            config, modified, record, model.module, inputs, *names, only_batch or None
        )

    def _write_config(self, config: Path, inputs: tuple[torch.Tensor, ...]) -> None:
        from amct_pytorch.flows.post_training import create_quant_config

        given = self._request.config
        if given is not None and given.suffix == ".json":
            text = read_text(given, "--config")
            number = _batch_num_of(text, given)
            if number != self._number:
                self._note(f"config: batch_num {number} becomes {self._number}, the data's")
                text = json.dumps({**json.loads(text), "batch_num": self._number}, indent=4)
            config.write_text(text)
            return
        with named_as("skip_layers", "--skip"):
            create_quant_config(
                config,
                self._model.module,
                inputs,
                skip_layers=list(self._request.skip) or None,
                batch_num=self._number,
                activation_offset=not self._request.symmetric,
                config_defination=given,
            )
        document = json.loads(config.read_text())
        document["batch_num"] = self._number
        if self._request.best:
            for layer in document.values():
                if isinstance(layer, dict) and "weight_quant_params" in layer:
                    layer["weight_quant_params"] |= {
                        "wts_algo": "ada_quantize",
                        "num_iteration": BEST_ITERATIONS,
                    }
        config.write_text(json.dumps(document, indent=4, ensure_ascii=False) + "\n")

    def report(self) -> None:
        """The HTML page of the ledger."""
        from amct_pytorch.cli.comparing import compared
        from amct_pytorch.cli.models import TorchRunner, runner
        from amct_pytorch.report.html import write_report

        self._note("comparing with float on the same data, for the report")
        model = self._model
        quantized = "qdq_model.onnx" if self._request.qdq else "deploy_model.onnx"
        reference = (
            TorchRunner(model.module, model.input_names, model.output_names or [])
            if model.file is None
            else runner(str(model.file), "MODEL")
        )
        other = runner(str(self.path(quantized)), "QUANT")
        _, document = compared(reference, other, self._data, REPORT_ROUNDS)
        comparison = self.path("comparison.json")
        comparison.write_text(json.dumps(document, indent=4) + "\n")
        write_report(self.path("ledger.json"), self.path("report.html"), comparison=comparison)


def _batch_num_of(text: str, source: Path) -> Any:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--config: {source}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"--config: {source}: allowed: a JSON object, as amct writes it")
    return document.get("batch_num", 1)
