"""Finished blocks on disk, so that an interrupted distillation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from amct_pytorch.distillation.train_block import Outcome
from amct_pytorch.files import write_whole
from amct_pytorch.logs import logger


class Progress:
    """One folder a distillation: a file for each block that is finished.

    The folder's name follows from everything that the result depends on but the data, so that
    another model, config or setting never meets these files.

    Args:
        root: folder of all distillations.
        key: what the result depends on.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / key

    def load(self, number: int, layers: Sequence[str]) -> tuple[dict[str, Tensor], Outcome] | None:
        """What a finished block left; None where it is not finished.

        Args:
            number: of the block.
            layers: those in it.
        """
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()["amct.block"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["layers"] != list(layers):
                raise ValueError("other layers")
            return tensors, Outcome(**metadata["outcome"])
        except (ValueError, KeyError, TypeError, OSError, safetensors.SafetensorError) as error:
            logger.warning("%s is damaged (%s); its block is distilled again", path, error)
            return None

    def save(
        self,
        number: int,
        layers: Sequence[str],
        tensors: Mapping[str, Tensor],
        outcome: Outcome,
    ) -> None:
        """Keeps a finished block.

        Args:
            number: of the block.
            layers: those in it.
            tensors: its part of the student's state dict.
            outcome: of its distillation.
        """
        metadata = json.dumps({"layers": list(layers), "outcome": asdict(outcome)})
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = safetensors.torch.save(held, {"amct.block": metadata})
        write_whole(self._path(number), content, what="progress_dir", announce=False)

    def close(self) -> None:
        """Removes the folder of a distillation that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"block_{number}.safetensors"


def state_key(models: Sequence[nn.Module], *settings: object) -> str:
    """A name for everything that a distillation's result depends on but its data."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            if isinstance(tensor, Tensor):
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                plain = tensor.detach().cpu().contiguous().flatten()
                digest.update(plain.view(torch.uint8).numpy().tobytes())
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:16]
