"""The ledger of a model that was trained with its quantization."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from amct_pytorch.flows.calibration_ledger import float_entry, quantized_entry, whole_ledger
from amct_pytorch.graph.look import ModelGraph
from amct_pytorch.nn.calibrate import LayerErrors, Observe
from amct_pytorch.nn.retrain import TrainedQuantization
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.report.ledger import Ledger, OutputEntry, decibels


def training_ledger(
    flow: str,
    graph: ModelGraph,
    fused: Mapping[str, str],
    reasons: Mapping[str, str],
    settings: Mapping[str, TrainedQuantization],
    factors: Mapping[str, LayerFactors],
    observe: Observe,
    errors: Mapping[str, LayerErrors],
    output: OutputEntry | None,
    inexact: Collection[str],
    seconds: Mapping[str, float],
) -> Ledger:
    """The ledger of one trained model.

    Args:
        flow: name of the public function.
        graph: what a look at the float model found.
        fused: BatchNorm folded into each layer, by layer name.
        reasons: why each other layer stayed float.
        settings: how each layer was trained.
        factors: of each layer.
        observe: what was observed on the example inputs.
        errors: of each layer on them.
        output: agreement of the model's output on them.
        inexact: layers whose sums can leave what float32 holds exactly.
        seconds: wall time of each step.
    """
    entries = []
    for layer in graph.layers:
        name = layer.name
        if name not in factors:
            entries.append(float_entry(layer, reasons.get(name, "it was not trained")))
            continue
        entry = quantized_entry(layer, factors[name], observe.statistics[name], fused.get(name))
        bits = settings[name].weight_bits
        if bits != factors[name].weight_bits:
            entry.notes.append(
                f"weights have {bits} bits and are stored in {factors[name].weight_bits}: with "
                "groups or an odd number of input channels two cannot share a byte"
            )
        if factors[name].activation_bits != 8:
            entry.notes.append(f"input of {factors[name].activation_bits} bits")
        if name in inexact:
            entry.notes.append(
                "its sums can exceed 2^24, where the fake-quant model's float32 is not exact"
            )
        found = errors.get(name)
        if found is not None:
            entry.sqnr_db = decibels(found.final.sqnr_db)
            entry.cosine = found.final.cosine
        entries.append(entry)
    ledger = whole_ledger(flow, graph, entries, output, seconds)
    ledger.notes.append("errors are against the trained float model, on input_data")
    return ledger
