"""`ModelEvaluator`: calibrates and evaluates a model on raw ``.bin`` files."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from amct_pytorch.auto_calibration.evaluator import AutoCalibrationEvaluatorBase
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    FileAccessError,
    FileMissingError,
    did_you_mean,
    shown,
)
from amct_pytorch.graph.tensors import tensors_in
from amct_pytorch.observers.statistics import Agreement

DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
    "uint32", "uint64", "bool",
)  # fmt: skip
_SHAPE = re.compile(r"[1-9][0-9]*(,[1-9][0-9]*)*")


@dataclass(frozen=True)
class BinaryInput:
    """One input of a model, a file for each batch.

    Attributes:
        name: of the input.
        folder: where its files are.
        shape: of a batch.
        dtype: of its elements.
        files: in the order of their names.
    """

    name: str
    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    files: tuple[Path, ...]

    def batch(self, index: int) -> Tensor:
        """The batch in the file of that index.

        Raises:
            FileAccessError: the file cannot be read.
            ArgumentValueError: it does not have the size of the shape.
        """
        file = self.files[index]
        try:
            raw = file.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise FileAccessError(f"data_dir: cannot read {str(file)!r}: {reason}") from error
        expected = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        if len(raw) != expected:
            raise ArgumentValueError(
                f"{file} has {len(raw)} bytes; input {self.name!r} of shape "
                f"{','.join(map(str, self.shape))} and type {self.dtype} needs {expected}"
            )
        return torch.from_numpy(np.frombuffer(raw, self.dtype).reshape(self.shape).copy())


class ModelEvaluator(AutoCalibrationEvaluatorBase):
    """A ready evaluator for inputs that are there as raw ``.bin`` files, without labels.

    Its metric is therefore agreement with the float model: `evaluate` keeps the outputs of the
    first model it is given, which the search makes the float one, and returns 1; for every later
    model it returns the mean cosine similarity to those outputs. `metric_eval` accepts a loss
    of at most `allowed_loss`.

    Example::

        evaluator = amct.ModelEvaluator(
            data_dir="./data/input_bin/", input_shape="input:32,3,224,224", data_types="float32"
        )

    Args:
        data_dir: a folder for each input of the model, separated by ``;``, in the order of the
            model's arguments. The files of a folder, in ascending order of their names, are its
            batches.
        input_shape: ``"name1:n,c,h,w;name2:n,c,h,w"``.
        data_types: one of float16, float32, float64, int8 to int64, uint8 to uint64 and bool
            for each input, separated by ``;``, or one for all.

    Attributes:
        allowed_loss: what `metric_eval` lets pass, 0.01.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is not as described, naming what is.
        FileMissingError: a folder does not exist, or has no ``.bin`` file.
    """

    allowed_loss = 0.01

    def __init__(self, data_dir: str, input_shape: str, data_types: str) -> None:
        parts = {"data_dir": data_dir, "input_shape": input_shape, "data_types": data_types}
        for what, value in parts.items():
            if not isinstance(value, str):
                raise ArgumentTypeError(f"{what} is of type {type(value).__name__}; allowed is str")
        shapes = parse_shapes(input_shape)
        folders = _split(data_dir, "data_dir")
        types = parse_dtypes(data_types)
        for what, found in (("data_dir", folders), ("data_types", types)):
            if len(found) != len(shapes) and not (what == "data_types" and len(found) == 1):
                raise ArgumentValueError(
                    f"{what} has {len(found)} entries and input_shape {len(shapes)}; allowed: one "
                    f"for each input{', or one for all' if what == 'data_types' else ''}"
                )
        names = [name for name, _ in shapes]
        if len(set(names)) != len(names):
            raise ArgumentValueError(f"input_shape is {shown(input_shape)}: a name stands twice")
        types = types * len(shapes) if len(types) == 1 else types
        self._inputs = [
            BinaryInput(name, Path(folder), shape, np.dtype(kind), _files(folder))
            for (name, shape), folder, kind in zip(shapes, folders, types, strict=True)
        ]
        self._reference: list[list[Tensor]] = []
        self._first: weakref.ref[nn.Module] | None = None

    def calibration(self, model: nn.Module, batch_num: int = 1) -> None:
        """Runs the first `batch_num` batches through `model`.

        Raises:
            ArgumentTypeError, ArgumentValueError: `batch_num` is no whole number from 1 to the
                number of files, or a file does not have the size of its shape, naming it.
        """
        self._outputs(model, batch_num, "batch_num")

    def evaluate(self, model: nn.Module, iterations: int = 1) -> float:
        """Agreement with the first model that was evaluated, in [-1, 1]; see the class.

        Args:
            model: its outputs may be tensors, or nested in tuples, lists and dicts.
            iterations: how many batches, the first of them, to run.

        Raises:
            ArgumentTypeError, ArgumentValueError: as in `calibration`.
            CalibrationError: the model has other outputs than the first one, or none of a
                floating type; or the first one was evaluated on fewer batches.
        """
        outputs = self._outputs(model, iterations, "iterations")
        if not all(outputs):
            raise CalibrationError(
                "the model has no floating output; allowed: one or more, which the float model's "
                "are compared with"
            )
        first = None if self._first is None else self._first()
        if self._first is None or (first is model and len(outputs) > len(self._reference)):
            self._reference, self._first = outputs, weakref.ref(model)
            return 1.0
        if len(outputs) > len(self._reference):
            raise CalibrationError(
                f"iterations is {iterations}, and the first model that was evaluated, which others "
                f"are compared with, was evaluated on {len(self._reference)}; allowed: at most so "
                "many"
            )
        cosines = []
        for number, (meant, found) in enumerate(zip(self._reference, outputs, strict=False)):
            if [t.shape for t in meant] != [t.shape for t in found]:
                raise CalibrationError(
                    f"batch {number}: the model's outputs have shapes "
                    f"{[list(t.shape) for t in found]}; those of the first model that was "
                    f"evaluated {[list(t.shape) for t in meant]}"
                )
            cosines += [Agreement.between(a, b).cosine for a, b in zip(meant, found, strict=True)]
        return float(np.mean(cosines))

    def metric_eval(self, original_metric: float, new_metric: float) -> tuple[bool, float]:
        """Whether at most `allowed_loss` was lost, and how much."""
        loss = original_metric - new_metric
        return loss <= self.allowed_loss, loss

    def _outputs(self, model: nn.Module, number: int, what: str) -> list[list[Tensor]]:
        """Floating outputs of the first batches, float32 on the CPU."""
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(
                f"model is of type {type(model).__name__}; allowed is torch.nn.Module"
            )
        available = min(len(given.files) for given in self._inputs)
        if not isinstance(number, int) or isinstance(number, bool):
            raise ArgumentTypeError(f"{what} is {shown(number)}; allowed: a whole number")
        if not 1 <= number <= available:
            raise ArgumentValueError(
                f"{what} is {number}; allowed: 1 to {available}, the files of every input"
            )
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        found = []
        with torch.no_grad():
            for index in range(number):
                batch = [given.batch(index).to(device) for given in self._inputs]
                floating = (t for t in tensors_in(model(*batch)) if t.is_floating_point())
                found.append([t.detach().float().cpu() for t in floating])
        return found


def _split(text: str, what: str) -> list[str]:
    entries = [part.strip() for part in text.split(";")]
    if entries and not entries[-1]:
        entries.pop()
    if not entries or not all(entries):
        raise ArgumentValueError(f"{what} is {shown(text)}; allowed: entries separated by ';'")
    return entries


def parse_shapes(text: str, what: str = "input_shape") -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of ``"name1:n,c,h,w;name2:n,c,h,w"``.

    Raises:
        ArgumentValueError: naming `what` and the entry that is wrong.
    """
    return [_shape(part, what) for part in _split(text, what)]


def _shape(text: str, what: str) -> tuple[str, tuple[int, ...]]:
    name, colon, sizes = text.rpartition(":")
    sizes = sizes.replace(" ", "")
    if not colon or not name or not _SHAPE.fullmatch(sizes):
        raise ArgumentValueError(
            f"{what} has the entry {shown(text)}; allowed: 'name:n,c,h,w' with sizes of 1 or more"
        )
    return name, tuple(int(size) for size in sizes.split(","))


def parse_dtypes(text: str, what: str = "data_types") -> list[str]:
    """The element types of ``"float32;int64"``, each one of `DTYPES`.

    Raises:
        ArgumentValueError: naming `what` and the entry that is wrong.
    """
    names = _split(text, what)
    for name in names:
        if name not in DTYPES:
            raise ArgumentValueError(
                f"{what} has the entry {shown(name)}{did_you_mean(name, DTYPES)}; allowed: "
                f"{', '.join(DTYPES)}"
            )
    return names


def _files(folder: str) -> tuple[Path, ...]:
    path = Path(folder)
    if not path.is_dir():
        raise FileMissingError(f"data_dir: the folder {folder!r} does not exist")
    files = tuple(sorted(file for file in path.iterdir() if file.suffix == ".bin"))
    if not files:
        raise FileMissingError(f"data_dir: the folder {folder!r} has no .bin file")
    return files
