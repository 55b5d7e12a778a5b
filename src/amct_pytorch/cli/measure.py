"""How far two models' outputs are apart, batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from amct_pytorch.errors import CalibrationError


@dataclass
class OutputAgreement:
    """Agreement of one output, over all batches so far.

    Attributes:
        name: of the output.
        signal: sum of squares of the float model's values.
        noise: sum of squares of the differences.
        other: sum of squares of the other model's values.
        dot: sum of products.
        largest: largest absolute difference.
        rows: rows whose best class was compared; 0 where the output is no matrix.
        same: of these, how many have the same best class.
        lost: values that are NaN or infinite in one model only.
    """

    name: str
    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    dot: float = 0.0
    largest: float = 0.0
    rows: int = 0
    same: int = 0
    lost: int = 0

    def add(self, meant: np.ndarray, found: np.ndarray) -> None:
        """Takes one batch in.

        Raises:
            CalibrationError: the shapes differ.
        """
        if meant.shape != found.shape:
            raise CalibrationError(
                f"output {self.name!r} has shape {list(meant.shape)} in the one and "
                f"{list(found.shape)} in the other model"
            )
        if meant.ndim == 2 and meant.shape[1] > 1:
            self.rows += len(meant)
            self.same += int((meant.argmax(1) == found.argmax(1)).sum())
        a, b = meant.astype(np.float64).ravel(), found.astype(np.float64).ravel()
        finite = np.isfinite(a) & np.isfinite(b)
        self.lost += int((~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())
        a, b = a[finite], b[finite]
        difference = a - b
        self.signal += float(a @ a)
        self.other += float(b @ b)
        self.dot += float(a @ b)
        self.noise += float(difference @ difference)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))

    @property
    def sqnr_db(self) -> float:
        """10 log10 of signal over noise; infinite where all is equal."""
        if self.lost:
            return -math.inf
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Of the two as vectors; 1 where both are zero."""
        if self.lost:
            return 0.0
        norm = math.sqrt(self.signal * self.other)
        return self.dot / norm if norm else float(self.noise == 0)

    @property
    def top1_agreement(self) -> float | None:
        """Share of rows with the same best class; None where the output is no matrix."""
        return self.same / self.rows if self.rows else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an infinite SQNR is null, with ``exact`` true."""
        from amct_pytorch.report.ledger import decibels

        return {
            "name": self.name,
            "sqnr_db": decibels(self.sqnr_db),
            "exact": self.noise == 0 and not self.lost,
            "cosine": self.cosine,
            "top1_agreement": self.top1_agreement,
            "largest_difference": self.largest,
        }


@dataclass(frozen=True)
class Goals:
    """What the user asks of accuracy; None: nothing."""

    sqnr_db: float | None = None
    cosine: float | None = None
    top1: float | None = None

    @property
    def any(self) -> bool:
        """Whether anything is asked for."""
        return any(value is not None for value in (self.sqnr_db, self.cosine, self.top1))

    def missed(
        self, sqnr_db: float | None, cosine: float, top1: float | None, what: str
    ) -> list[str]:
        """What is not reached, in words.

        Args:
            sqnr_db: measured; None: no error.
            cosine: measured.
            top1: measured; None: the output has no best class.
            what: of what these are.
        """
        found = []
        if self.sqnr_db is not None and sqnr_db is not None and sqnr_db < self.sqnr_db:
            found.append(f"{what}: SQNR {sqnr_db:.2f} dB, asked for {self.sqnr_db:g}")
        if self.cosine is not None and cosine < self.cosine:
            found.append(f"{what}: cosine {cosine:.5f}, asked for {self.cosine:g}")
        if self.top1 is not None and top1 is None:
            found.append(f"{what}: it has no best class, asked for agreement {self.top1:g}")
        elif self.top1 is not None and top1 is not None and top1 < self.top1:
            found.append(f"{what}: top-1 agreement {top1:.4f}, asked for {self.top1:g}")
        return found
