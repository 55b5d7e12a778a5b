"""The ledger of channel pruning: what became of every group, every layer, and the costs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from amct_pytorch.report.network import Network

PRUNING_LEDGER_VERSION = 1


@dataclass
class GroupEntry:
    """Channels that were pruned, or left, together.

    Attributes:
        producers: names of the layers that make them.
        consumers: names of what follows or takes them.
        total: number of channels.
        kept: how many of them stay.
        ratio: share that was asked for; None where nothing was.
        reason: why none went; None where some did.
        notes: why fewer went than were asked for.
    """

    producers: list[str]
    consumers: list[str]
    total: int
    kept: int
    ratio: float | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class PrunedLayer:
    """One convolution or linear layer.

    Attributes:
        name: dotted module path.
        type: its class's name.
        status: ``pruned`` (fewer output channels), ``followed`` (fewer of others') or ``whole``.
        reason: why it has all its output channels; None if it has not.
        channels: output channels before and after.
        parameters: of the module, before and after.
        flops: twice the multiply-accumulates on input_data, before and after.
    """

    name: str
    type: str
    status: str
    reason: str | None
    channels: tuple[int, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]


@dataclass
class PruningLedger:
    """Everything one channel pruning did to one model.

    Attributes:
        groups: in the order in which the network makes their channels.
        layers: in module order.
        parameters: of the whole model, before and after.
        flops: of all layers on input_data, before and after.
        milliseconds: of one forward on input_data here, before and after; the least of a few.
        unfollowed: calls through which channels could not be followed.
        seconds: wall time of each step.
        bytes: sizes of the files written.
        notes: what concerns the whole model.
        flow: name of the public function.
        version: of this file's format.
        network: which layer feeds which.
    """

    groups: list[GroupEntry]
    layers: list[PrunedLayer]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    milliseconds: tuple[float, float] | None = None
    unfollowed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    flow: str = "create_prune_retrain_model"
    version: int = PRUNING_LEDGER_VERSION
    network: Network | None = None

    def to_json(self) -> str:
        """JSON text; NaN and infinities never appear in it."""
        return json.dumps(dataclasses.asdict(self), indent=4, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruningLedger:
        """The ledger that `to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        ledger: PruningLedger = TypeAdapter(cls).validate_json(text)
        return ledger

    def summary(self) -> str:
        """The whole model in one line."""
        line = (
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,} "
            f"(x {_ratio(self.parameters):.3f}), FLOPs {self.flops[0]:,} -> {self.flops[1]:,} "
            f"(x {_ratio(self.flops):.3f})"
        )
        if self.milliseconds is not None:
            before, after = self.milliseconds
            line += f", one forward {before:.1f} -> {after:.1f} ms"
        return line


def _ratio(pair: tuple[int, int]) -> float:
    return pair[1] / pair[0] if pair[0] else 1.0


def pruning_table(ledger: PruningLedger) -> str:
    """One line a group and a summary, as plain text without a final newline."""
    rows = [("channels of", "kept", "of", "")]
    for group in ledger.groups:
        told = "; ".join([group.reason or "", *group.notes]).strip("; ")
        rows.append((", ".join(group.producers), str(group.kept), str(group.total), told))
    widths = [min(max(len(row[i]) for row in rows), 60) for i in range(3)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines[:1]))
    return "\n".join([*lines, "", ledger.summary()])
