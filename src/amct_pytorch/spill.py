"""Tensors that live in a file, where they take no memory that something else needs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from amct_pytorch.graph.tensors import ModelInputs, map_tensors
from amct_pytorch.logs import logger


class Spill:
    """A temporary folder of tensors, gone when it is closed, the process dies or is killed.

    Each file loses its name as soon as it is mapped into memory, where the system allows that,
    so that nothing needs to be cleaned up. TMPDIR says where the folder is.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._number = 0

    def close(self) -> None:
        """Removes the folder; tensors that are still held stay readable where names are gone."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values as a CPU tensor that is read from the file when it is used.

        Raises:
            OSError: the disk is full.
        """
        if not tensor.numel():
            return tensor.detach().cpu()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(
                prefix="amct-spill-", ignore_cleanup_errors=True
            )
            logger.info("%s are kept in %s until calibration ends", self._what, self._folder.name)
        self._number += 1
        path = Path(self._folder.name) / str(self._number)
        flat = tensor.detach().cpu().contiguous().flatten()
        # Written, not mapped: on a full disk a mapped write ends the process.
        flat.view(torch.uint8).numpy().tofile(path)
        mapped = torch.from_file(os.fspath(path), False, flat.numel(), dtype=flat.dtype)
        with contextlib.suppress(OSError):
            path.unlink()
        return mapped.view(tensor.shape)

    def set_aside(self, tensor: Tensor) -> None:
        """Gives a tensor the memory of a file in place of its own, which is let go.

        It has the same values, shape and strides as before. Left as they are: tensors on other
        devices, subclasses, and those whose values do not fill their memory. Other tensors that
        share its memory keep that, and see no later change of this one in place.

        Raises:
            OSError: the disk is full.
        """
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or not tensor.numel():
            return
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        in_order = tensor.permute(order)
        if not in_order.is_contiguous():
            return
        kept = self.keep(in_order)
        tensor.set_(kept.untyped_storage(), 0, tensor.shape, tensor.stride())


class KeptInputs:
    """Arguments of a forward call, kept for another one.

    Args:
        inputs: the arguments.
        spill: where their tensors go.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, inputs: ModelInputs, spill: Spill) -> None:
        self._devices: list[torch.device] = []

        def keep(tensor: Tensor) -> Tensor:
            self._devices.append(tensor.device)
            return spill.keep(tensor)

        self._args, self._kwargs = map_tensors((inputs.args, inputs.kwargs), keep)

    def taken(self) -> ModelInputs:
        """The arguments, each tensor a copy where it was."""
        places = iter(self._devices)
        args, kwargs = map_tensors(
            (self._args, self._kwargs), lambda tensor: tensor.clone().to(next(places))
        )
        return ModelInputs(args, kwargs)
