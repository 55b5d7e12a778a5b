"""The ledger of 2:4 sparsity: what became of every layer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from amct_pytorch.report.network import Network

SPARSITY_LEDGER_VERSION = 1


@dataclass
class SparsityEntry:
    """One layer of the model.

    Attributes:
        name: dotted module path.
        type: row of the layer table.
        status: ``2:4`` or ``dense``.
        reason: why it stayed dense; None for a sparse layer.
        weights: number of its weights.
        kept: number of weights that are not forced to zero.
        magnitude_kept: share of the sum of |w| that the kept weights have; None where the layer
            computes its weight.
        update_freq: batches between two selections; 0: only one, at the first batch.
        batches: training batches that it has seen.
    """

    name: str
    type: str
    status: str
    reason: str | None = None
    weights: int = 0
    kept: int = 0
    magnitude_kept: float | None = None
    update_freq: int | None = None
    batches: int | None = None


@dataclass
class SparsityLedger:
    """Everything 2:4 sparsity did to one model.

    Attributes:
        layers: every layer of a type that can be sparse, in module order.
        totals: weights and kept weights of all these layers.
        seconds: wall time of each step.
        bytes: sizes of the files written.
        notes: what concerns the whole model.
        flow: name of the public function.
        version: of this file's format.
        network: which layer feeds which.
    """

    layers: list[SparsityEntry]
    totals: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    flow: str = "save_prune_retrain_model"
    version: int = SPARSITY_LEDGER_VERSION
    network: Network | None = None

    def add_up(self) -> None:
        """Fills `totals`."""
        for key in ("weights", "kept"):
            self.totals[key] = sum(getattr(entry, key) for entry in self.layers)

    def to_json(self) -> str:
        """JSON text; NaN and infinities never appear in it."""
        return json.dumps(dataclasses.asdict(self), indent=4, allow_nan=False) + "\n"
