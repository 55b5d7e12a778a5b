"""Finished blocks on disk, so that an interrupted distillation goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import CodeType

import safetensors.torch
import torch
from torch import Tensor, nn

from amct_pytorch.distillation.train_block import Outcome
from amct_pytorch.files import write_whole
from amct_pytorch.logs import logger


class Progress:
    """One folder a distillation: a file for each block that is finished.

    The folder's name follows from everything that the result depends on, so that another model,
    config, setting or other data never meet these files.

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
            outcome = Outcome(**metadata["outcome"])
        except (ValueError, KeyError, TypeError, OSError, safetensors.SafetensorError) as error:
            logger.warning("%s is damaged (%s); its block is distilled again", path, error)
            return None
        logger.warning(
            "block %s was distilled before an interruption; taken from %s", ", ".join(layers), path
        )
        return tensors, outcome

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


def state_key(tensors: Iterable[Tensor], *settings: object) -> str:
    """A name for everything that a distillation's result depends on.

    Args:
        tensors: weights, buffers and data.
        settings: whose `repr` says what they are.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def identity(thing: object) -> str:
    """What a user's function, class or object is, so that another one has another name.

    Functions are known by their code, constants, defaults and what they close over; a thing
    that says nothing of itself is only equal to itself, within one process.
    """
    if isinstance(thing, functools.partial):
        parts = (thing.func, *thing.args, *sorted(thing.keywords.items(), key=str))
        return f"partial{[identity(part) for part in parts]}"
    if isinstance(thing, tuple | list):
        return str([identity(part) for part in thing])
    if isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__}"
    code = getattr(thing, "__code__", None)
    if isinstance(code, CodeType):
        closed = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        inside = [c.co_code if isinstance(c, CodeType) else c for c in code.co_consts]
        return repr(
            (
                getattr(thing, "__qualname__", ""),
                code.co_code,
                code.co_names,
                inside,
                getattr(thing, "__defaults__", None),
                [identity(value) for value in closed],
            )
        )
    if isinstance(thing, torch.optim.Optimizer):
        return repr((type(thing).__qualname__, thing.defaults))
    if isinstance(thing, nn.Module):
        settings = {k: v for k, v in vars(thing).items() if isinstance(v, int | float | str)}
        return repr((thing, settings, state_key(thing.state_dict().values())))
    if isinstance(thing, Tensor):
        return state_key([thing])
    return repr(thing)
