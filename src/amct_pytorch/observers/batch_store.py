"""Keeping calibration batches to run them again, in memory while small, else on disk."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amct_pytorch.graph.tensors import ModelInputs, map_tensors

logger = logging.getLogger("amct_pytorch")

# Batches beyond this many bytes together go to a temporary folder.
MEMORY_LIMIT = 32 * 2**20


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file of its own."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Tensor:
        raw = bytearray(self.path.read_bytes())
        return torch.frombuffer(raw, dtype=self.dtype).view(self.shape).to(self.device)


class BatchStore:
    """Model arguments by batch number.

    Tensors are copied, so later changes of the caller's buffers do no harm. `close` removes
    the temporary folder, if there is one.
    """

    def __init__(self, memory_limit: int = MEMORY_LIMIT) -> None:
        self._limit = memory_limit
        self._used = 0
        self._batches: dict[int, ModelInputs] = {}
        self._resources = ExitStack()
        self._folder: Path | None = None
        self._files = 0

    def __len__(self) -> int:
        return len(self._batches)

    def put(self, number: int, inputs: ModelInputs) -> None:
        """Keeps a copy of one batch's arguments."""
        args, kwargs = map_tensors((inputs.args, inputs.kwargs), self._keep)
        self._batches[number] = ModelInputs(args, kwargs)

    def batches(self) -> Iterator[tuple[int, ModelInputs]]:
        """Each kept batch with its number, in order; copies that a forward may change."""
        for number, kept in self._batches.items():
            yield number, ModelInputs(_loaded(kept.args), _loaded(kept.kwargs))

    def close(self) -> None:
        """Forgets everything and removes the files."""
        self._batches.clear()
        self._resources.close()

    def _keep(self, tensor: Tensor) -> Any:
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if self._used + size <= self._limit or size == 0:
            self._used += size
            return tensor.clone()
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="amct-batches-")
            self._folder = Path(self._resources.enter_context(folder))
            logger.info("calibration batches are kept in %s until calibration ends", folder.name)
        self._files += 1
        path = self._folder / f"{self._files}.bin"
        flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
        flat.numpy().tofile(path)
        return _OnDisk(path, tensor.shape, tensor.dtype, tensor.device)


def _loaded(value: Any) -> Any:
    if isinstance(value, _OnDisk):
        return value.load()
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _loaded(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_loaded(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_loaded(item) for item in value)
    return value
