"""How close one set of logits is to another: the figures in the demo's and benchmarks' tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Fidelity:
    """What quantization did to the logits of N images, and how many are still right."""

    cosine: float
    """Mean over the images of the cosine between float and quantized logits."""
    sqnr_db: float
    """10 log10 of the float logits' energy over that of the difference, all images together."""
    agreement: float
    """Share of images whose best class is the float network's best class."""
    top1: float
    top5: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return asdict(self)


def compare(reference: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> Fidelity:
    """Judge `logits` [N, classes] by the float `reference` [N, classes] and `labels` [N]."""
    if reference.shape != logits.shape or len(labels) != len(logits):
        raise ValueError(
            f"reference {reference.shape}, logits {logits.shape} and labels {labels.shape} "
            "should be of the same images and classes"
        )
    reference = reference.astype(np.float64)
    logits = logits.astype(np.float64)
    return Fidelity(
        cosine=float(_cosine(reference, logits).mean()),
        sqnr_db=sqnr_db(reference, logits),
        agreement=float((reference.argmax(1) == logits.argmax(1)).mean()),
        top1=float((logits.argmax(1) == labels).mean()),
        top5=float((np.argsort(-logits, axis=1)[:, :5] == labels[:, None]).any(1).mean()),
    )


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization noise ratio in dB; infinite where the two are equal."""
    noise = float(np.square(reference - other).sum())
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(np.square(reference).sum() / noise))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: np.ndarray = (a * b).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return cosines
