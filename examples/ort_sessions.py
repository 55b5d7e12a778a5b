"""ONNX Runtime on batches of images, and latencies side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amct_pytorch.export import runtime
from amct_pytorch.export.runtime import Runs, cpu_options, cpu_session

__all__ = ["Runs", "cpu_options", "cpu_session", "interleaved_latency", "run_batches"]


def run_batches(
    session: Runs,
    images: np.ndarray,
    batch_size: int = 8,
) -> np.ndarray:
    """First output for all `images`, batch by batch."""
    name = session.get_inputs()[0].name
    starts = range(0, len(images), batch_size)
    return np.concatenate(
        [session.run(None, {name: images[start : start + batch_size]})[0] for start in starts]
    )


def interleaved_latency(
    sessions: Mapping[str, Runs],
    image: np.ndarray,
    rounds: int = 60,
    warm_up: int = 8,
) -> dict[str, list[float]]:
    """Milliseconds of every call on one image, the sessions taking turns."""
    feeds = {name: {s.get_inputs()[0].name: image} for name, s in sessions.items()}
    return runtime.interleaved_latency(sessions, feeds, rounds, warm_up)
