"""The ledger: what happened to every layer, and what it cost in accuracy, size and time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from amct_pytorch.observers.statistics import Agreement
from amct_pytorch.report.network import Network

LEDGER_VERSION = 1
# Below these the quantized model's output has little to do with the float model's.
POOR_SQNR_DB = 10.0
POOR_COSINE = 0.95
# Stands for minus infinity, which JSON cannot hold.
LOST_DB = -999.0
# For reading: no NaN or infinity, which `Ledger.to_json` does not write either.
_NUMBERS = re.compile(r"\[\n\s*([-+.\deE]+(?:,\n\s*[-+.\deE]+)*)\n\s*\]")
_FINITE = ConfigDict(allow_inf_nan=False)


def decibels(value: float | None) -> float | None:
    """`value` as JSON can hold it.

    Infinity (no error at all) becomes None; minus infinity (an error where there is no signal,
    or values lost to NaN) becomes `LOST_DB`.
    """
    if value is None or value == math.inf:
        return None
    return value if math.isfinite(value) else LOST_DB


def numbers_in_a_line(text: str) -> str:
    """Indented JSON with each list of numbers on one line, for people who read it."""
    # A line break is never inside a string, where JSON has it as two characters.
    return _NUMBERS.sub(lambda found: f"[{', '.join(found[1].split())}]".replace(",,", ","), text)


@dataclass
class InputHistogram:
    """What was observed at a layer's input, in equal bins.

    Attributes:
        low: lower end of the first bin, the smallest value observed.
        high: upper end of the last bin, the largest value observed.
        counts: values in each bin, spread from finer ones and rounded.
    """

    __pydantic_config__ = _FINITE

    low: float
    high: float
    counts: list[int]


@dataclass
class LayerEntry:
    """One layer of the model.

    Attributes:
        name: dotted module path.
        type: row of the layer table, e.g. ``Conv2d``.
        status: ``quantized`` or ``float``.
        reason: why it stayed float; None for a quantized layer.
        parameters: number of its weights.
        fused: name of the BatchNorm that was folded into it, or None.
        input_scale: scale_d.
        input_offset: offset_d.
        input_range: smallest and largest value observed at its input.
        weight_bits: bits of its weights.
        weight_scales: number of weight scales (1, or one per output channel).
        weight_scale_range: smallest and largest of them.
        sqnr_db: of its output, quantized network against float network, on the last
            calibration batch; None: no error at all.
        cosine: cosine of the two outputs.
        sqnr_db_uncorrected: sqnr_db without this layer's bias correction.
        bias_corrected: whether a corrected bias is deployed.
        notes: whatever was clamped, rolled back or fell back.
        input_bits: bits of the integers that its input becomes.
        input_histogram: of all values observed at its input.
        weight_shape: shape of its weight.
        output_shape: shape of its output on one calibration batch.
        macs: multiply-accumulates on one sample.
    """

    __pydantic_config__ = _FINITE

    name: str
    type: str
    status: str
    reason: str | None = None
    parameters: int = 0
    fused: str | None = None
    input_scale: float | None = None
    input_offset: int | None = None
    input_range: tuple[float, float] | None = None
    weight_bits: int | None = None
    weight_scales: int | None = None
    weight_scale_range: tuple[float, float] | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    sqnr_db_uncorrected: float | None = None
    bias_corrected: bool | None = None
    notes: list[str] = field(default_factory=list)
    input_bits: int | None = None
    input_histogram: InputHistogram | None = None
    weight_shape: list[int] | None = None
    output_shape: list[int] | None = None
    macs: int | None = None


@dataclass
class BlockEntry:
    """One block of a distillation.

    Attributes:
        layers: those in it, in the order in which they run.
        loss_before: mean loss over the batches before training, quantized.
        loss_after: after it.
        best_epoch: the epoch that its parameters are from; 0: it is as it was before.
        seconds: wall time.
    """

    __pydantic_config__ = _FINITE

    layers: list[str]
    loss_before: float
    loss_after: float
    best_epoch: int
    seconds: float


@dataclass
class OutputEntry:
    """Agreement of the whole model's output on the last calibration batch.

    Attributes:
        sqnr_db: None: no error at all.
        cosine: cosine of float and quantized output.
        top1_agreement: share of rows with the same largest column, where the first output
            is a matrix; else None.
    """

    __pydantic_config__ = _FINITE

    sqnr_db: float | None
    cosine: float
    top1_agreement: float | None = None

    @property
    def poor(self) -> bool:
        """Whether the quantized model can hardly be what the user wants."""
        low = self.sqnr_db is not None and self.sqnr_db < POOR_SQNR_DB
        return low or self.cosine < POOR_COSINE


@dataclass
class Ledger:
    """Everything one flow did to one model.

    Attributes:
        flow: name of the flow's public function.
        layers: in module order.
        output: agreement of the model's output, None before it was measured.
        seconds: wall time of each step.
        bytes: sizes of the files written.
        notes: what concerns the whole model.
        version: of this file's format.
        blocks: those that were distilled.
        network: which layer feeds which.
    """

    __pydantic_config__ = _FINITE

    flow: str
    layers: list[LayerEntry]
    output: OutputEntry | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    version: int = LEDGER_VERSION
    blocks: list[BlockEntry] = field(default_factory=list)
    network: Network | None = None

    def to_json(self, indent: int | None = None) -> str:
        """JSON text; NaN and infinities never appear in it."""
        return numbers_in_a_line(
            json.dumps(dataclasses.asdict(self), indent=indent, allow_nan=False)
        )

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The ledger that `to_json` wrote.

        Raises:
            ValueError: the text is something else; keys of later versions are passed over.
        """
        ledger: Ledger = TypeAdapter(cls).validate_json(text)
        return ledger


def output_entry(original: list[Any], other: list[Any]) -> OutputEntry | None:
    """Compares the tensors that the float and the quantized model returned."""
    pairs = [
        (a, b)
        for a, b in zip(original, other, strict=False)
        if a.is_floating_point() and a.shape == b.shape
    ]
    if not pairs:
        return None
    # The worst output tensor speaks for the model.
    worst = min((Agreement.between(a, b) for a, b in pairs), key=lambda found: found.sqnr_db)
    first, second = pairs[0]
    top1 = None
    if first.dim() == 2 and first.shape[1] > 1 and first.shape[0] > 0:
        top1 = float((first.argmax(1) == second.argmax(1)).float().mean())
    return OutputEntry(decibels(worst.sqnr_db), worst.cosine, top1)
