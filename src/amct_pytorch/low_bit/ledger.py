"""The ledger of `quantize` and `convert`: what happens to each layer, and why not."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from amct_pytorch.observers.statistics import Agreement
from amct_pytorch.report.ledger import decibels


@dataclass
class LayerOutcome:
    """One layer that has weights.

    Attributes:
        name: dotted module path.
        type: class name.
        status: ``float`` (left as it is), ``calibrating``, ``calibrated`` or ``deployed``.
        reason: why it was left as it is; None for others.
        algorithm: name of the algorithm.
        weights: number format and granularity of the weights.
        inputs: the same of the inputs; None: not quantized.
        float_bytes: size of weight and bias before.
        stored_bytes: size of weight, scales and bias after.
        sqnr_db: of the layer's output on the last calibration batch, or some of its tokens,
            quantized against float with the same input; None before it was measured, and without
            any error.
        cosine: cosine of the two outputs.
        notes: whatever was clipped, damped, fell back or is limited elsewhere.
    """

    name: str
    type: str
    status: str = "float"
    reason: str | None = None
    algorithm: str | None = None
    weights: str | None = None
    inputs: str | None = None
    float_bytes: int = 0
    stored_bytes: int | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    notes: list[str] = field(default_factory=list)

    def measured(self, agreement: Agreement, stored_bytes: int) -> None:
        """Notes the result of calibration."""
        self.status = "calibrated"
        self.sqnr_db, self.cosine = decibels(agreement.sqnr_db), agreement.cosine
        self.stored_bytes = stored_bytes

    def __str__(self) -> str:
        if self.status == "float":
            return f"{self.name}: {self.type} stays float: {self.reason}"
        quality = "not calibrated yet" if self.status == "calibrating" else "error not measured"
        if self.cosine is not None:
            decibel = "no error" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
            quality = f"{decibel}, {self.float_bytes} -> {self.stored_bytes} bytes"
        inputs = "" if self.inputs is None else f", inputs {self.inputs}"
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{self.name}: {self.algorithm}, weights {self.weights}{inputs}, "
            f"{self.status}, {quality}{notes}"
        )


@dataclass
class LowBitLedger:
    """Every layer with weights, in module order; `print` shows one a line.

    `quantize` leaves it on the model as ``model.amct_ledger``; calibration and `convert` add to
    it, `save_converted` and `load_converted` keep it.
    """

    layers: list[LayerOutcome] = field(default_factory=list)

    @property
    def quantized(self) -> list[LayerOutcome]:
        """The layers that are not left as they are."""
        return [layer for layer in self.layers if layer.status != "float"]

    def to_json(self, indent: int | None = None) -> str:
        """JSON text of all entries."""
        return json.dumps(dataclasses.asdict(self), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> LowBitLedger:
        """The inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: the text is no such ledger.
        """
        return cls([LayerOutcome(**layer) for layer in json.loads(text)["layers"]])

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers)
