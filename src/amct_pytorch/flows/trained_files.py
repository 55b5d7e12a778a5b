"""The files of a model that was trained with its quantization: record, ONNX models, ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from amct_pytorch.algorithms.solve import output_range
from amct_pytorch.errors import CalibrationError, ModelError
from amct_pytorch.files import PathLike, WholeFiles, check_distinct, check_writable
from amct_pytorch.flows.outputs import output_path
from amct_pytorch.flows.preparation import Names, names_of_weights, warn_if_poor
from amct_pytorch.flows.training_ledger import training_ledger
from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.graph.look import (
    ModelGraph,
    check_model,
    copy_model,
    copy_sharing_weights,
    look_at,
)
from amct_pytorch.graph.tensors import (
    ModelInputs,
    in_own_precision,
    random_state_kept,
    tensors_in,
)
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.memory import release_memory
from amct_pytorch.nn.calibrate import Check, Observe
from amct_pytorch.nn.instrument import instrument
from amct_pytorch.nn.retrain import RetrainLayer, retrain_layers, without_quantization
from amct_pytorch.nn.simulate import IntegerOperands
from amct_pytorch.nn.sparse import sparse_layers
from amct_pytorch.nn.wrapped import CompressedLayer, Stage, compressed_layers
from amct_pytorch.processes import rank
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.record.record_file import RecordFile, write_record
from amct_pytorch.report.ledger import BlockEntry, output_entry
from amct_pytorch.report.table import ledger_table

POOR_ADVICE = (
    "If these are typical data, train longer, with a lower learning rate, or leave these layers in "
    "float (retrain_enable false)"
)


class SilentWriter:
    """The forward hook of a copied model, which writes nothing."""

    def __call__(self, *_: Any) -> None:
        """Nothing."""


class RecordWriter:
    """A forward hook: each inference pass in eval mode brings the record up to date.

    Args:
        path: the record.
        beside: what else the record holds (what was pruned, say); its factors are replaced.
    """

    def __init__(self, path: Path, beside: RecordFile | None = None) -> None:
        self._path = path
        self._beside = beside or RecordFile()
        self._written: dict[str, LayerFactors] = {}
        self._told = False  # that ranges are not known

    def __deepcopy__(self, _: Any) -> SilentWriter:
        """A copy of the model (for an average of weights, say) does not write its record."""
        return SilentWriter()

    @torch.compiler.disable
    def __call__(self, model: nn.Module, _: Any, __: Any) -> None:
        """Writes the factors, if they are others than those written last."""
        if model.training or rank() != 0:
            return
        layers = retrain_layers(model)
        self._tell_of_float(layers)
        factors = {name: layer.found for name, layer in layers.items() if layer.found is not None}
        if factors and factors != self._written:
            write_record(self._path, replace(self._beside, factors=factors), announce=False)
            self._written = factors

    def _tell_of_float(self, layers: Mapping[str, RetrainLayer]) -> None:
        waiting = [
            name
            for name, layer in layers.items()
            if not (layer.training or layer.input_quantizer.ready)
        ]
        if waiting and not self._told:
            self._told = True
            quantizer = layers[waiting[0]].input_quantizer
            logger.warning(
                "%d of %d layers were evaluated in float (%s first): %d of batch_num %d training "
                "batches have run, and the ranges of their inputs start from these",
                len(waiting),
                len(layers),
                waiting[0],
                quantizer.seen,
                quantizer.batch_num,
            )


def begin_record(
    model: nn.Module,
    inputs: ModelInputs,
    path: Path,
    beside: RecordFile | None = None,
    *,
    announce: bool = True,
) -> None:
    """Writes a record with what is known, and has inference passes bring it up to date.

    Args:
        model: from `nn.retrain.instrument_for_training`.
        inputs: that it can be run on.
        path: the record.
        beside: what else it holds.
        announce: whether the log tells of a record that was there.
    """
    if rank() == 0:
        factors = current_factors(model, inputs)
        record = replace(beside or RecordFile(), factors=factors)
        write_record(path, record, announce=announce)
    model.register_forward_hook(RecordWriter(path.absolute(), beside))


def current_factors(model: nn.Module, inputs: ModelInputs) -> dict[str, LayerFactors]:
    """The factors of all layers that run on `inputs`, in module order.

    Those of inputs are missing while ranges are not known.
    """
    return _evaluated(_without_writers(model), inputs)


def _without_writers(model: nn.Module) -> nn.Module:
    """A copy in eval mode, with the same weights, that writes no record."""
    copied = copy_sharing_weights(model).eval()
    hooks = copied._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, RecordWriter)]:
        del hooks[key]
    return copied


def _evaluated(model: nn.Module, inputs: ModelInputs) -> dict[str, LayerFactors]:
    layers = retrain_layers(model)
    for layer in layers.values():
        layer.found = None
    with in_own_precision(model), random_state_kept(model):
        inputs.copied().call(model)
    return {name: layer.found for name, layer in layers.items() if layer.found is not None}


def save_trained(
    model: nn.Module,
    inputs: ModelInputs,
    record_file: PathLike,
    save_path: PathLike,
    names: Names,
    *,
    flow: str,
    reasons: Callable[[ModelGraph], Mapping[str, str]],
    beside: RecordFile | None = None,
    notes: Mapping[str, str] = MappingProxyType({}),
    blocks: Sequence[BlockEntry] = (),
) -> None:
    """Writes the fake-quant and deploy model, record and ledger of a trained model.

    Of several processes the first one does; none waits for another.

    Args:
        model: with layers of `nn.retrain.instrument_for_training`; left untouched.
        inputs: example inputs, which layers' errors are measured on.
        record_file: record to write.
        save_path: folder and prefix of the other files.
        names: `input_names`, `output_names` and `dynamic_axes`.
        flow: name of the public function, for the ledger.
        reasons: given what a look at the float model found, says why each layer that was not
            trained in quantization was not; may refuse the model.
        beside: what else the record holds.
        notes: what else was done to layers, for the ledger; of the whole model under ``""``.
        blocks: those that were distilled, for the ledger.

    Raises:
        AmctError: naming the argument, file or layer; nothing is written then.
    """
    from onnx import helper

    from amct_pytorch.export.deploy import EXTRA_RANGES, build_deploy
    from amct_pytorch.export.fake_quant import build_fake_quant
    from amct_pytorch.export.float_model import (
        check_exportable,
        check_names,
        check_output_count,
        export_float,
    )
    from amct_pytorch.export.integer_layer import inexact_in_float32
    from amct_pytorch.export.onnx_file import save_onnx

    started = time.perf_counter()
    targets = {name: output_path(save_path, name) for name in ("fake_quant", "deploy", "ledger")}
    for path in targets.values():
        check_writable(path, "save_path")
        check_distinct(record_file=record_file, save_path=path)
    record_path = check_writable(record_file, "record_file")
    check_model(model)
    layers = _ready_layers(model)
    input_names, output_names, dynamic_axes = names
    check_names(inputs, input_names, output_names, dynamic_axes, names_of_weights(model))
    if rank() != 0:
        return
    trained = _without_writers(model)
    factors = _evaluated(trained, inputs)
    not_run = [name for name in layers if name not in factors]
    if not_run:
        raise ModelError(
            f"layer {not_run[0]!r} did not run on input_data; give the inputs that the model was "
            "created with"
        )
    plain = copy_model(trained)
    without_quantization(plain)
    graph = look_at(plain, inputs, LAYER_KINDS)
    check_output_count(output_names, len(graph.trace.outputs))
    check_exportable(graph.trace)
    why_float = reasons(graph)
    fused = _fused_norms(layers, graph)
    start_logging(to_file=True)
    # Sparse layers that stay float are put in too, so that the files hold their sparse weight.
    instrumented = instrument(plain, graph, inputs, {*layers, *sparse_layers(plain)}, fused)
    del plain
    checked = _Comparison.of(instrumented, layers, factors, inputs)
    looked = time.perf_counter()
    _deployed_weights(instrumented, layers, factors)
    float_model = export_float(
        instrumented,
        inputs,
        input_names=input_names,
        output_names=output_names,
        dynamic_axes=dynamic_axes,
    )
    exported = time.perf_counter()
    ledger = training_ledger(
        flow,
        graph,
        fused,
        why_float,
        {name: layer.settings for name, layer in layers.items()},
        factors,
        checked.observe,
        checked.check.errors,
        output_entry(checked.float_outputs, checked.outputs),
        inexact_in_float32(float_model, factors),
        {"look and check": looked - started, "export": exported - looked},
    )
    ledger.notes += [text for name, text in notes.items() if not name]
    for entry in ledger.layers:
        if entry.name in notes:
            entry.notes.append(notes[entry.name])
    ledger.blocks = list(blocks)
    helper.set_model_props(float_model, {EXTRA_RANGES: json.dumps(_output_ranges(trained))})
    release_memory()
    with WholeFiles() as files:
        ledger.bytes = {
            "fake-quant": save_onnx(
                build_fake_quant(float_model, factors),
                targets["fake_quant"],
                what="save_path",
                external_suffix="_fakequant.external",
                files=files,
            ),
            "deploy": save_onnx(
                build_deploy(float_model, factors),
                targets["deploy"],
                what="save_path",
                external_suffix="_deploy.external",
                files=files,
            ),
        }
        ledger.seconds["save"] = round(time.perf_counter() - exported, 4)
        files.write(targets["ledger"], ledger.to_json(indent=4).encode(), what="save_path")
        record = replace(beside or RecordFile(), factors=factors)
        write_record(record_path, record, announce=False, files=files)
    print(ledger_table(ledger))
    warn_if_poor(ledger, "input_data", POOR_ADVICE)


def _ready_layers(model: nn.Module) -> dict[str, RetrainLayer]:
    layers = retrain_layers(model)
    if not layers:
        raise ModelError(
            "the model has no layer that is trained with its quantization; give the module that "
            "create_quant_retrain_model (or the like) returned"
        )
    waiting = [name for name, layer in layers.items() if not layer.input_quantizer.ready]
    if waiting:
        quantizer = layers[waiting[0]].input_quantizer
        raise CalibrationError(
            f"the input ranges of {', '.join(map(repr, waiting))} are not known: "
            f"{quantizer.seen} of batch_num {quantizer.batch_num} training batches have run "
            f"through {waiting[0]!r}; run the others in training mode first"
        )
    return layers


def _fused_norms(layers: Mapping[str, RetrainLayer], graph: ModelGraph) -> dict[str, str]:
    """The BatchNorm to fold into each layer, which is the one it was trained with."""
    seen = {layer.name: layer for layer in graph.layers}
    fused = {}
    for name, layer in layers.items():
        if name not in seen or seen[name].reason is not None:
            reason = seen[name].reason if name in seen else "it is gone"
            raise ModelError(f"layer {name!r} cannot be deployed as it was trained: {reason}")
        norm = graph.fusable_norms.get(name)
        if (norm is None) != (layer.norm is None):
            raise ModelError(
                f"layer {name!r}: the BatchNorm behind it is not the one that it was trained "
                "with; the model runs otherwise than when it was created"
            )
        if norm is not None:
            fused[name] = norm
    return fused


def _output_ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Ranges of what layers returned when the model was evaluated, where that was observed."""
    return {
        name: output_range(layer.outputs)
        for name, layer in retrain_layers(model).items()
        if layer.outputs is not None and layer.outputs.total
    }


def _deployed_weights(
    model: nn.Module, layers: Mapping[str, RetrainLayer], factors: Mapping[str, LayerFactors]
) -> None:
    """Puts weights on their four-bit grid that will be stored in eight bits."""
    for name, layer in _quantized(model, layers).items():
        if layers[name].settings.weight_bits == factors[name].weight_bits:
            continue
        integers = layers[name].integers(layer.weight, factors[name])
        scale = torch.tensor(factors[name].scale_w).to(layer.weight.device)
        layer.weight.data.copy_(integers * layer.per_output(scale))


def _quantized(model: nn.Module, layers: Mapping[str, RetrainLayer]) -> dict[str, CompressedLayer]:
    """The layers of an instrumented model that are quantized."""
    return {name: layer for name, layer in compressed_layers(model).items() if name in layers}


class _Comparison:
    """One run of the float network and one of the deployed one, layer by layer."""

    def __init__(self, observe: Observe, check: Check, float_outputs: Any, outputs: Any) -> None:
        self.observe = observe
        self.check = check
        self.float_outputs = list(tensors_in(float_outputs))
        self.outputs = list(tensors_in(outputs))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Mapping[str, RetrainLayer],
        factors: Mapping[str, LayerFactors],
        inputs: ModelInputs,
    ) -> _Comparison:
        found = _quantized(model, layers)
        operands = {
            name: IntegerOperands.on(
                layer.weight.detach(),
                layer.bias.detach(),
                factors[name],
                layer.layout,
                integer_weight=layers[name].integers(layer.weight, factors[name]),
            )
            for name, layer in found.items()
        }
        observe = Observe(found, frozenset(), with_means=False)
        observe.last = True
        check = Check(operands, observe.statistics, {})
        results = []
        stages: tuple[Stage, Stage] = (observe, check)
        for stage in stages:
            # A copy for each run: a forward may change buffers and attributes.
            copied = copy_sharing_weights(model)
            for layer in _quantized(copied, layers).values():
                layer.stage = stage
            with in_own_precision(model), random_state_kept(model):
                results.append(inputs.copied().call(copied))
        return cls(observe, check, *results)
