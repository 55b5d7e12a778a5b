"""How a figure of a ledger is called, written and sorted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

from amct_pytorch.report.ledger import LOST_DB

# Figure of a layer -> (heading, how a number is written).
LABELS: dict[str, tuple[str, str]] = {
    "type": ("type", ""),
    "algorithm": ("algorithm", ""),
    "weights": ("weights", ",d"),
    "inputs": ("inputs", ""),
    "sqnr_db": ("SQNR dB", ".1f"),
    "drop_db": ("drop dB", ".1f"),
    "cosine": ("cosine", ".5f"),
    "error": ("error", ".4g"),
    "other_error": ("error otherwise", ".4g"),
    "sqnr_db_uncorrected": ("SQNR dB before bias correction", ".1f"),
    "bias_corrected": ("bias corrected", ""),
    "parameters": ("parameters", ",d"),
    "parameters_before": ("parameters before", ",d"),
    "parameters_after": ("parameters after", ",d"),
    "flops": ("FLOPs", ",d"),
    "flops_before": ("FLOPs before", ",d"),
    "flops_after": ("FLOPs after", ",d"),
    "bitops": ("bit operations", ",d"),
    "macs": ("multiply-adds a sample", ",d"),
    "channels": ("channels", ",d"),
    "kept": ("kept", ",d"),
    "magnitude_kept": ("magnitude kept", ".1%"),
    "sensitivity": ("sensitivity", ".4g"),
    "weight_bits": ("weight bits", "d"),
    "weight_scales": ("weight scales", "d"),
    "weight_scale_range": ("weight scales from, to", ".3g"),
    "weight_shape": ("weight shape", "d"),
    "output_shape": ("output shape", "d"),
    "input_scale": ("input scale", ".4g"),
    "input_offset": ("offset", "d"),
    "input_range": ("observed from, to", ".4g"),
    "input_bits": ("input bits", "d"),
    "float_bytes": ("bytes before", ",d"),
    "stored_bytes": ("bytes after", ",d"),
    "milliseconds": ("ms", ".2f"),
    "milliseconds_before": ("ms before", ".2f"),
    "milliseconds_after": ("ms after", ".2f"),
    "loss_before": ("loss before", ".4g"),
    "loss_after": ("loss after", ".4g"),
    "seconds": ("seconds", ".2f"),
    "rank_estimate": ("rank wanted", "d"),
    "fused": ("BatchNorm folded in", ""),
}
# Pairs of these are before and after, not from and to.
BEFORE_AFTER = frozenset({"channels", "parameters", "flops", "bitops", "milliseconds"})


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        order: what it is sorted by; None: last.
    """

    text: str
    order: float | str | None = None


def heading(key: str) -> str:
    """What a figure is called."""
    return LABELS[key][0] if key in LABELS else key.replace("_", " ")


def cell(key: str, value: Any) -> Cell:
    """How a figure is written and sorted."""
    spec = LABELS.get(key, ("", ""))[1]
    if value is None or value == []:
        return Cell("")
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if number(value):
        return Cell(written(value, spec), float(value))
    if isinstance(value, (list, tuple)):
        parts = [written(item, spec) if number(item) else str(item) for item in value]
        joined = " → ".join(parts) if key in BEFORE_AFTER else ", ".join(parts)
        last = value[-1]
        return Cell(joined, float(last) if number(last) else joined)
    return Cell(str(value), str(value))


def written(value: float, spec: str) -> str:
    """A number by a format specification; empty: as suits its type."""
    if value == LOST_DB:
        return "lost"
    if spec in ("d", ",d") and isinstance(value, float):
        spec = ".4g" if value != int(value) else spec
        value = int(value) if spec != ".4g" else value
    if not spec:
        spec = ",d" if isinstance(value, int) else ".4g"
    return format(value, spec)


def number(value: Any) -> TypeGuard[float]:
    """Whether it is one; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
