"""The ledger of a decomposition: what became of every Conv2d, its error and its costs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DECOMPOSITION_LEDGER_VERSION = 1


@dataclass
class DecompositionEntry:
    """One Conv2d of the model.

    Attributes:
        name: dotted module path.
        status: ``decomposed`` or ``kept``.
        reason: why it was kept; None for a decomposed layer.
        kernel: (height, width).
        stride: (vertical, horizontal).
        mode: as in the info file.
        rank: channels between the pieces (the smallest, for Tucker-2).
        rank_estimate: what the rank policy wanted before bounds and rounding.
        rank_estimate_at_least: whether the estimate is a lower bound: it is above the bounds.
        shapes: weight shapes of the pieces.
        error: relative Frobenius error of the weight.
        other_error: that of the alternative, the other kernel order at equal cost; guessed to a
            few percent where `method` is ``lanczos``.
        method: how the factors were found.
        output_error: relative error of the pieces' output on calibration_data; None without it.
        output_error_unfitted: the same before the last piece was fitted to the outputs.
        parameters_before: weights and biases of the layer.
        parameters_after: of what stands in its place.
        flops_before: twice the multiply-accumulates; see `DecompositionLedger.flops_of`.
        flops_after: of what stands in its place.
        milliseconds_before: measured latency of one forward; None without input_data.
        milliseconds_after: of the pieces, measured in turns with it.
        input_shape: of the tensor measured with.
        seconds: that solving took.
    """

    name: str
    status: str
    reason: str | None
    kernel: tuple[int, int]
    stride: tuple[int, int]
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    mode: str | None = None
    rank: int | None = None
    rank_estimate: int | None = None
    rank_estimate_at_least: bool = False
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)
    error: float | None = None
    other_error: float | None = None
    method: str | None = None
    output_error: float | None = None
    output_error_unfitted: float | None = None
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    input_shape: tuple[int, ...] | None = None
    seconds: float = 0.0


@dataclass
class DecompositionLedger:
    """Everything one decomposition did to one model.

    Attributes:
        layers: every Conv2d, in module order.
        rank_policy: its name and values.
        flops_of: ``one output position`` of each layer or ``one sample of input_data``.
        calibration_batches: that the pieces were fitted to; 0: they follow the weights alone.
        totals: parameters and FLOPs of all these layers, before and after.
        seconds: wall time of each step.
        flow: name of the public function.
        version: of this file's format.
    """

    layers: list[DecompositionEntry]
    rank_policy: dict[str, Any]
    flops_of: str
    calibration_batches: int = 0
    totals: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    flow: str = "auto_decomposition"
    version: int = DECOMPOSITION_LEDGER_VERSION

    def add_up(self) -> None:
        """Fills `totals`."""
        for key in ("parameters_before", "parameters_after", "flops_before", "flops_after"):
            self.totals[key] = sum(getattr(entry, key) for entry in self.layers)

    def to_json(self) -> str:
        """JSON text; NaN and infinities never appear in it."""
        return json.dumps(dataclasses.asdict(self), indent=4, allow_nan=False) + "\n"


def ledger_beside(info_path: Path) -> Path:
    """Where the ledger of an info file goes: ``net.json`` gives ``net_ledger.json``."""
    return info_path.with_name(f"{info_path.stem}_ledger.json")


def entry_line(entry: DecompositionEntry) -> str:
    """One layer in one line, for the log."""
    if entry.status != "decomposed":
        return f"{entry.name or 'the model'}: left alone: {entry.reason}"
    estimate = f"{'>= ' if entry.rank_estimate_at_least else ''}{entry.rank_estimate}"
    line = (
        f"{entry.name or 'the model'}: {entry.mode}, rank {entry.rank} (estimate {estimate}), "
        f"error {entry.error:.3f}, parameters "
        f"{entry.parameters_before} -> {entry.parameters_after}, FLOPs x "
        f"{entry.flops_after / entry.flops_before:.2f}"
    )
    if entry.output_error is not None:
        line += f", output error {entry.output_error:.3f}"
    if entry.milliseconds_before is not None:
        line += f", {entry.milliseconds_before:.2f} -> {entry.milliseconds_after:.2f} ms"
    return line
