"""The ledger of a search for channels: what was found for every layer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from amct_pytorch.report.network import Network


@dataclass
class SearchedLayer:
    """One convolution or linear layer.

    Attributes:
        name: dotted module path.
        status: ``searched``, ``fixed`` (by override_prune_cfg) or ``left``.
        reason: why it was left; None for others.
        channels: output channels, before and after.
        bitops: bit complexity, before and after.
        sensitivity: sum over its channels, of those that stay and of those that go; None where
            it was not searched.
    """

    name: str
    status: str
    reason: str | None
    channels: tuple[int, int]
    bitops: tuple[int, int]
    sensitivity: tuple[float, float] | None = None


@dataclass
class SearchLedger:
    """Everything one search found.

    Attributes:
        compress_ratio: asked for and reached.
        largest_ratio: that could have been reached.
        layers: in the order of the run.
        sensitivity: name of the class.
        search_alg: name of the class.
        seconds: wall time of each step.
        flow: name of the public function.
        version: of this file's format.
        network: which layer feeds which.
    """

    compress_ratio: tuple[float, float]
    largest_ratio: float
    layers: list[SearchedLayer]
    sensitivity: str
    search_alg: str
    seconds: dict[str, float] = field(default_factory=dict)
    flow: str = "auto_channel_prune_search"
    version: int = 1
    network: Network | None = None

    def to_json(self) -> str:
        """JSON text; NaN and infinities never appear in it."""
        return json.dumps(dataclasses.asdict(self), indent=4, allow_nan=False) + "\n"
