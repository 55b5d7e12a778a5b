"""Logits of whatever a contender made: a torch module, an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[np.ndarray], np.ndarray]


def of_module(model: Any, batch_size: int = 8) -> Logits:
    """Logits of a torch module, without gradients."""
    import torch

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [model(batch) for batch in torch.from_numpy(images).split(batch_size)]
        result: np.ndarray = torch.cat(parts).float().numpy()
        return result

    return run


def of_onnx(file: Path) -> Logits:
    """Logits of an ONNX file in ONNX Runtime, with kernels that do not clip."""
    from ort_sessions import cpu_session, run_batches

    return lambda images: run_batches(cpu_session(file), images)


def of_deploy(file: Path) -> Logits:
    """Logits by a deploy model's own integer arithmetic."""
    from ort_sessions import cpu_options, run_batches

    import amct_pytorch as amct

    return lambda images: run_batches(amct.DeploySession(file, cpu_options()), images)
