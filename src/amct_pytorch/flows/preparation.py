"""What happens between a config and the first calibration batch, and after the last."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.solve import output_ranges
from amct_pytorch.config.calibration_json import load_calibration_json
from amct_pytorch.config.layer_rules import with_packable_weights
from amct_pytorch.config.models import CalibrationConfig
from amct_pytorch.errors import ConfigError, RecordError
from amct_pytorch.files import PathLike, WholeFiles, check_distinct, check_writable
from amct_pytorch.flows.calibration import Calibration, CalibrationResult, ada_settings
from amct_pytorch.flows.calibration_ledger import calibration_ledger
from amct_pytorch.graph.activations import following_activations
from amct_pytorch.graph.layers import CALIBRATED_KINDS
from amct_pytorch.graph.look import ModelGraph, look_at
from amct_pytorch.graph.pairs import scalable_pairs
from amct_pytorch.graph.readers import layers_read_in_float
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.memory import release_memory
from amct_pytorch.nn.equalize import equalize, move_factors
from amct_pytorch.nn.instrument import instrument
from amct_pytorch.nn.wrapped import CompressedLayer, compressed_layers
from amct_pytorch.processes import rank
from amct_pytorch.record.fingerprint import fingerprint
from amct_pytorch.record.record_file import RecordFile, read_record, write_record
from amct_pytorch.report.ledger import Ledger

if TYPE_CHECKING:
    from amct_pytorch.export.float_model import DynamicAxes

LEDGER_KEY = "amct.ledger"
FINGERPRINT_KEY = "amct.fingerprint"

InputData: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Names: TypeAlias = "tuple[Sequence[str] | None, Sequence[str] | None, DynamicAxes | None]"


@dataclass(frozen=True)
class Prepared:
    """A model that waits for its calibration batches.

    Attributes:
        model: the instrumented copy.
        graph: what a look at the user's model found.
        config: the calibration config.
        fused: BatchNorm folded into each layer, by layer name.
        notes: what became of the config's wishes, by layer name.
        onnx_path: the modified ONNX model.
        record_path: the record.
        seconds: wall time of what has been done.
    """

    model: nn.Module
    graph: ModelGraph
    config: CalibrationConfig
    fused: Mapping[str, str]
    notes: Mapping[str, str]
    onnx_path: Path
    record_path: Path
    seconds: Mapping[str, float]

    def complete(
        self, result: CalibrationResult, config: CalibrationConfig | None = None
    ) -> Ledger:
        """Completes both files, together.

        Args:
            result: with the factors of the layers that are quantized. Their modules hold the
                biases that are deployed.
            config: what the ledger tells of the other layers; None: the config they were
                calibrated with.
        """
        from amct_pytorch.export.deploy import EXTRA_RANGES

        started = time.perf_counter()
        ledger = calibration_ledger(
            self.graph,
            config or self.config,
            self.fused,
            self.notes,
            result,
            {**self.seconds, **result.seconds},
        )
        layers = compressed_layers(self.model)
        tensors = {
            name: (layers[name].bias, _rounded_weight(layers[name], result))
            for name in result.factors
            if layers[name].layout
        }
        metadata = {
            FINGERPRINT_KEY: fingerprint(result.factors),
            LEDGER_KEY: ledger.to_json(),
            EXTRA_RANGES: json.dumps(output_ranges(result.statistics)),
        }
        record = RecordFile(factors=dict(result.factors))
        with WholeFiles() as files:
            _complete_onnx(self.onnx_path, tensors, metadata, files)
            write_record(self.record_path, record, announce=False, files=files)
        release_memory()
        logger.info("calibration files written in %.2f s", time.perf_counter() - started)
        return ledger


def prepare(
    config_file: PathLike,
    modfied_onnx_file: PathLike,
    record_file: PathLike,
    model: nn.Module,
    input_data: InputData,
    names: Names,
    finished: Callable[[Prepared, CalibrationResult], None],
    *,
    all_outputs: bool = False,
) -> Prepared:
    """Instruments a copy of a model and begins both files; see `quantize_model`.

    Args:
        config_file: see there, like the next four.
        modfied_onnx_file: see there.
        record_file: see there.
        model: see there.
        input_data: see there.
        names: `input_names`, `output_names` and `dynamic_axes`.
        finished: called when the last batch has run.
        all_outputs: whether output ranges of all layers are wanted; otherwise of those that
            something in float reads.

    Raises:
        AmctError: see there.
    """
    from amct_pytorch.export.float_model import (
        check_exportable,
        check_names,
        check_output_count,
        export_float,
    )
    from amct_pytorch.export.onnx_file import save_onnx

    start_logging(to_file=False)
    input_names, output_names, dynamic_axes = names
    inputs = ModelInputs.of(input_data)
    weights = names_of_weights(model)
    check_names(inputs, input_names, output_names, dynamic_axes, weights)
    check_distinct(
        config_file=config_file, modfied_onnx_file=modfied_onnx_file, record_file=record_file
    )
    onnx_path = check_writable(modfied_onnx_file, "modfied_onnx_file")
    record_path = check_writable(record_file, "record_file")
    started = time.perf_counter()
    graph = look_at(model, inputs)
    check_output_count(output_names, len(graph.trace.outputs))
    check_exportable(graph.trace)
    start_logging(to_file=True)
    config = load_calibration_json(config_file, graph.layers, graph.module_names)
    config, notes = with_packable_weights(config, graph.layers)
    enabled = list(config.enabled_layers())
    if not enabled:
        raise ConfigError(f"{config_file}: no layer is enabled; {nothing_to_quantize(graph)}")
    fused = fused_norms(graph, config)
    balance = balance_factors(config, graph, record_path)
    moves = config.cross_layer_equalization or balance
    pairs = scalable_pairs(graph, enabled, fused) if moves else {}
    tensors = {name: torch.tensor(factors) for name, factors in balance.items()}
    multiplied = {name: factors for name, factors in tensors.items() if name not in pairs}
    told = dict(notes)

    def rescale(layers: Mapping[str, CompressedLayer]) -> None:
        told.update(_rescale(layers, config, tensors, pairs))

    instrumented = instrument(model, graph, inputs, enabled, fused, multiplied, rescale)
    release_memory()
    looked = time.perf_counter()
    float_model = None
    if rank() == 0:  # of several processes, this one writes
        float_model = export_float(
            instrumented,
            inputs,
            input_names=input_names,
            output_names=output_names,
            dynamic_axes=dynamic_axes,
        )
    gc.collect()  # The exporter's graphs are cycles.
    release_memory()
    seconds = {"look and fuse": looked - started, "export": time.perf_counter() - looked}
    prepared = Prepared(instrumented, graph, config, fused, told, onnx_path, record_path, seconds)
    with_outputs = (
        frozenset(enabled) if all_outputs else layers_read_in_float(graph, enabled, fused)
    )
    calibration = Calibration(
        instrumented,
        config,
        with_outputs,
        following_activations(graph, ada_settings(config), fused, instrumented),
        balance,
        inputs,
        lambda result: finished(prepared, result),
    )
    if float_model is not None:
        begun = RecordFile(factors=calibration.initial_factors())
        # The ONNX model first: one that is not completed goes with no record.
        with WholeFiles() as files:
            save_onnx(float_model, onnx_path, what="modfied_onnx_file", files=files)
            write_record(record_path, begun, files=files)
    del float_model
    release_memory()
    return prepared


def names_of_weights(model: nn.Module) -> set[str]:
    """The names that a model's tensors have in its ONNX file."""
    if not isinstance(model, nn.Module):
        return set()
    modules = {f"{path}.{name}" for path, _ in model.named_modules() for name in ("weight", "bias")}
    return modules | {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def _rescale(
    layers: Mapping[str, CompressedLayer],
    config: CalibrationConfig,
    balance: Mapping[str, Tensor],
    pairs: Mapping[str, str],
) -> dict[str, str]:
    """Moves factors between neighbouring layers; tells of each layer."""
    notes = {}
    if config.cross_layer_equalization:
        notes = equalize(layers, pairs)
        if not pairs:
            logger.warning("cross_layer_equalization: no two layers have a scale to share")
    for name, factors in balance.items():
        if name in pairs:
            move_factors(layers[pairs[name]], layers[name], factors)
            notes[name] = f"balanced at no cost: 1 / factor is in the weights of {pairs[name]}"
    return notes


def fused_norms(graph: ModelGraph, config: CalibrationConfig) -> dict[str, str]:
    """The BatchNorm to fold into each enabled layer, by layer name."""
    if not config.do_fusion:
        return {}
    return {
        name: norm
        for name, norm in graph.fusable_norms.items()
        if name in config.enabled_layers() and name not in config.skip_fusion_layers
    }


def balance_factors(
    config: CalibrationConfig, graph: ModelGraph, record_path: Path
) -> dict[str, tuple[float, ...]]:
    """The balance factors that a record has for the layers that the config wants balanced.

    Raises:
        FileMissingError, RecordError: there is no record; it lacks a layer's factors, or has
            another number of them than the layer has input channels.
    """
    wanted = [
        layer
        for layer in graph.layers
        if layer.name in config.enabled_layers()
        and config.layers[layer.name].dmq_balancer_param is not None
    ]
    if not wanted:
        return {}
    first = "call quantize_preprocess and run one forward pass of what it returns first"
    if not record_path.exists():
        raise RecordError(
            f"{record_path} does not exist, but layer {wanted[0].name!r} has dmq_balancer_param, "
            f"whose factors come from it; {first}"
        )
    held = read_record(record_path)
    held.check_keys(layer.name for layer in graph.layers)
    found = {}
    for layer in wanted:
        factors = held.factors.get(layer.name)
        if factors is None or not factors.balance:
            raise RecordError(
                f"{record_path}: layer {layer.name!r} has dmq_balancer_param in the config and no "
                f"tensor_balance_factor here; {first}"
            )
        if len(factors.balance) != layer.in_channels:
            raise RecordError(
                f"{record_path}: layer {layer.name!r} has {len(factors.balance)} "
                f"tensor_balance_factor; allowed: one for each of {layer.in_channels} input "
                f"channels; {first}"
            )
        found[layer.name] = factors.balance
    return found


def nothing_to_quantize(graph: ModelGraph) -> str:
    """Why no layer of a model can be quantized, or what to do that one is."""
    if not graph.layers:
        return (
            f"the model has no layer that can be quantized; such are {', '.join(CALIBRATED_KINDS)}"
        )
    if any(layer.quantizable for layer in graph.layers):
        return "set quant_enable of at least one layer to true"
    reasons = "; ".join(f"{layer.name or 'the model'}: {layer.reason}" for layer in graph.layers)
    return f"no layer of the model can be quantized; {reasons}"


def _rounded_weight(layer: CompressedLayer, result: CalibrationResult) -> Tensor | None:
    """What the weight was rounded to, where that is not simply the nearest."""
    learned = result.rounded.get(layer.name)
    if learned is None or learned.rounded is None:
        return None
    scale = torch.tensor(result.factors[layer.name].scale_w).to(layer.weight.device)
    return result.operands[layer.name].weight.float() * layer.per_output(scale)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array


def _complete_onnx(
    path: Path,
    tensors: Mapping[str, tuple[Tensor, Tensor | None]],
    metadata: Mapping[str, str],
    files: WholeFiles,
) -> None:
    """Rewrites the modified ONNX with its final biases and weights, and with metadata."""
    from amct_pytorch.export.calibrated import complete
    from amct_pytorch.export.onnx_file import load_onnx, save_onnx

    model = load_onnx(path, "modfied_onnx_file", tensors_stay=True)
    biases = {name: _array(bias) for name, (bias, _) in tensors.items()}
    weights = {name: _array(weight) for name, (_, weight) in tensors.items() if weight is not None}
    complete(model, biases, weights, metadata)
    save_onnx(model, path, what="modfied_onnx_file", announce=False, files=files)


MORE_DATA = (
    "Give more, or more typical, calibration data, or leave these layers in float (quant_enable "
    "false)"
)


def warn_if_poor(ledger: Ledger, data: str = "calibration data", advice: str = MORE_DATA) -> None:
    """Says loudly that the quantized model has little to do with the float one."""
    if ledger.output is None or not ledger.output.poor:
        return
    worst = sorted(
        (entry for entry in ledger.layers if entry.sqnr_db is not None),
        key=lambda entry: entry.sqnr_db or 0.0,
    )[:3]
    names = ", ".join(f"{entry.name} ({entry.sqnr_db:.1f} dB)" for entry in worst)
    logger.warning(
        "POOR AGREEMENT: the quantized model's output has SQNR %s dB and cosine %.4f against the "
        "float model on %s. Worst layers: %s. %s.",
        "inf" if ledger.output.sqnr_db is None else f"{ledger.output.sqnr_db:.1f}",
        ledger.output.cosine,
        data,
        names,
        advice,
    )
