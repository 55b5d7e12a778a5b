"""The ledger of a post-training calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from amct_pytorch.config.models import AdaParams, CalibrationConfig
from amct_pytorch.flows.calibration import CalibrationResult
from amct_pytorch.graph.layers import ADA_KINDS, LAYER_KINDS, SeenLayer
from amct_pytorch.graph.look import ModelGraph
from amct_pytorch.nn.reconstruct import Reconstruction
from amct_pytorch.observers.statistics import LayerStatistics
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.report.layer_facts import describe_input, describe_size, traced_network
from amct_pytorch.report.ledger import LayerEntry, Ledger, OutputEntry, decibels


def calibration_ledger(
    graph: ModelGraph,
    config: CalibrationConfig,
    fused: Mapping[str, str],
    notes: Mapping[str, str],
    result: CalibrationResult,
    seconds: Mapping[str, float],
) -> Ledger:
    """The ledger of one post-training calibration.

    Args:
        graph: what a look at the model found.
        config: the calibration config.
        fused: BatchNorm folded into each layer, by layer name.
        notes: what became of the config's wishes, by layer name.
        result: what calibration found.
        seconds: wall time of each step.
    """
    entries = [
        _quantized(layer, config, fused, notes, result)
        if layer.name in result.factors
        else _left_alone(layer, config, result)
        for layer in graph.layers
    ]
    return whole_ledger("quantize_model", graph, entries, result.output, seconds)


def whole_ledger(
    flow: str,
    graph: ModelGraph,
    entries: Sequence[LayerEntry],
    output: OutputEntry | None,
    seconds: Mapping[str, float],
) -> Ledger:
    """The ledger of a flow.

    Args:
        flow: name of its public function.
        graph: what a look at the model found; modules of other kinds are added from it.
        entries: of the layers.
        output: agreement of the model's output.
        seconds: wall time of each step.
    """
    others = [
        LayerEntry(
            other.name,
            other.type,
            "float",
            f"{other.type} is not supported in this version",
            other.parameters,
        )
        for other in graph.others
    ]
    order = {name: i for i, name in enumerate(graph.module_names)}
    sorted_entries = sorted([*entries, *others], key=lambda entry: order.get(entry.name, -1))
    rounded = {name: round(value, 4) for name, value in seconds.items()}
    network = traced_network(graph)
    return Ledger(flow, sorted_entries, output, rounded, network=network)


def float_entry(layer: SeenLayer, reason: str) -> LayerEntry:
    """The entry of a layer that stayed float."""
    return LayerEntry(layer.name, layer.kind, "float", reason, _parameters(layer))


def quantized_entry(
    layer: SeenLayer, factors: LayerFactors, statistics: LayerStatistics, norm: str | None
) -> LayerEntry:
    """The entry of a quantized layer, without its errors.

    Args:
        layer: the layer.
        factors: its factors.
        statistics: what was observed of it.
        norm: the BatchNorm that was folded into it.
    """
    observed = statistics.inputs
    entry = LayerEntry(
        layer.name,
        layer.kind,
        "quantized",
        parameters=_parameters(layer),
        fused=norm,
        input_scale=factors.scale_d,
        input_offset=factors.offset_d,
        input_range=(observed.low, observed.high),
    )
    describe_input(entry, factors, observed)
    describe_size(entry, layer, statistics.output_shape)
    if LAYER_KINDS[layer.kind].weighted:
        entry.weight_bits = factors.weight_bits
        entry.weight_scales = len(factors.scale_w)
        entry.weight_scale_range = (min(factors.scale_w), max(factors.scale_w))
    return entry


def _parameters(layer: SeenLayer) -> int:
    return math.prod(layer.weight_shape) if layer.weight_shape else 0


def _left_alone(
    layer: SeenLayer, config: CalibrationConfig, result: CalibrationResult
) -> LayerEntry:
    if layer.reason is not None:
        reason = layer.reason
    elif layer.name in result.not_run:
        reason = "it did not run on any calibration batch"
    elif layer.name in config.layers:
        reason = "the config says quant_enable false"
    else:
        reason = "it is not in the config"
    return float_entry(layer, reason)


def _quantized(
    layer: SeenLayer,
    config: CalibrationConfig,
    fused: Mapping[str, str],
    notes: Mapping[str, str],
    result: CalibrationResult,
) -> LayerEntry:
    factors = result.factors[layer.name]
    errors = result.errors.get(layer.name)
    entry = quantized_entry(layer, factors, result.statistics[layer.name], fused.get(layer.name))
    if layer.name in notes:
        entry.notes.append(notes[layer.name])
    learned = result.rounded.get(layer.name)
    if learned is not None:
        entry.notes.append(_told_of_ada(learned))
    elif isinstance(config.layers[layer.name].weight_quant_params, AdaParams):
        entry.notes.append(f"ADA is for {', '.join(sorted(ADA_KINDS))}; rounded to the nearest")
    if factors.balance:
        low, high = min(factors.balance), max(factors.balance)
        entry.notes.append(
            f"balanced: input channels divided by factors of {low:.3g} to {high:.3g}"
        )
    widened = result.widened.get(layer.name, 0)
    if widened:
        entry.notes.append(f"{widened} weight scales widened to keep the integer bias in range")
    if errors is None:
        entry.notes.append("its error was not measured: it did not run on the last batch")
        return entry
    entry.sqnr_db = decibels(errors.final.sqnr_db)
    entry.cosine = errors.final.cosine
    entry.sqnr_db_uncorrected = decibels(errors.uncorrected.sqnr_db)
    entry.bias_corrected = errors.corrected
    done = learned is not None and learned.rounded is not None
    if not errors.corrected and result.corrects and LAYER_KINDS[layer.kind].weighted and not done:
        entry.notes.append("bias correction taken back: it made this layer's error larger")
    return entry


def _told_of_ada(learned: Reconstruction) -> str:
    if learned.rounded is None:
        return "ADA could not follow its call; weights are rounded to the nearest"
    found = learned.rounded
    if not found.error_nearest:
        return f"ADA: nearest rounding has no error ({learned.seconds:.1f} s)"
    rest = found.error / found.error_nearest
    steps = f", {found.iterations} steps of learning" if found.iterations else ""
    return (
        f"ADA: error on its rows {rest:.2f} of that of nearest rounding{steps} "
        f"({learned.seconds:.1f} s)"
    )
