"""The models that are named on the command line: ONNX files, and ``module:factory``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from amct_pytorch.cli.data import InputSpec
from amct_pytorch.cli.wrong_kind import ONNX_KINDS, kind_told
from amct_pytorch.errors import (
    ArgumentTypeError,
    CalibrationError,
    ExportError,
    FileMissingError,
    ModelError,
    did_you_mean,
)
from amct_pytorch.graph.tensors import tensors_in

# Two runtimes add in other orders; float32 networks agree to 100 dB and more, half precision less.
SAME_MODEL_DB = {"float16": 30.0}
SAME_MODEL_DEFAULT_DB = 60.0


@dataclass(frozen=True)
class FloatModel:
    """A model to be quantized.

    Attributes:
        module: in eval mode.
        inputs: what is known of what it takes.
        input_names: names for the files.
        output_names: likewise; None: not known.
        dynamic_axes: as `quantize_model` takes them.
        file: the ONNX file it is from; None for a factory.
        name: what files are named after.
    """

    module: nn.Module
    inputs: list[InputSpec]
    input_names: list[str]
    output_names: list[str] | None
    dynamic_axes: dict[str, dict[int, str]] | None
    file: Path | None
    name: str


def float_model(text: str) -> FloatModel:
    """The model that MODEL names.

    Args:
        text: path of an ONNX file, or ``module:factory``.

    Raises:
        AmctError: there is no such file, module or factory; or it cannot be read, or run.
    """
    if is_factory(text):
        return _from_factory(text)
    from amct_pytorch.importing.reader import read_onnx_module

    path = Path(text)
    with kind_told(path, "MODEL", "an ONNX model", ONNX_KINDS):
        read = read_onnx_module(path, "MODEL")
    inputs = [InputSpec(given.name, given.shape, given.dtype) for given in read.inputs]
    names = list(read.module.input_names)
    outputs = list(read.module.output_names)
    stem = path.stem
    return FloatModel(read.module, inputs, names, outputs, read.dynamic_axes, path, stem)


def is_factory(text: str) -> bool:
    """Whether a model's name is ``module:factory`` and no file."""
    return ":" in text and not os.path.exists(text) and not text.endswith(".onnx")  # noqa: PTH110


def _from_factory(text: str) -> FloatModel:
    module = module_of(text)
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    names = names or ["input"]
    weights = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    names = [f"{name}_input" if name in weights else name for name in names]
    axes = {name: {0: "batch"} for name in names}
    inputs = [InputSpec(name) for name in names]
    stem = text.partition(":")[2].replace(".", "_")
    return FloatModel(module, inputs, names, None, axes, None, stem)


def module_of(text: str) -> nn.Module:
    """The module that ``module:factory`` returns (or is), in eval mode.

    The working directory counts as a place where Python modules are.

    Raises:
        ModelError: there is no such module or attribute, it raises, or gives something else.
    """
    place, _, attribute = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(place)
    except Exception as error:
        raise ModelError(
            f"MODEL {text!r}: module {place!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ModelError(
                f"MODEL {text!r}: {place!r} has no {name!r}{did_you_mean(name, dir(found))}"
            )
        found = getattr(found, name)
    if isinstance(found, nn.Module):
        return found.eval()
    if not callable(found):
        raise ModelError(f"MODEL {text!r} is a {type(found).__name__}; allowed: a function")
    try:
        model = found()
    except Exception as error:
        raise ModelError(
            f"MODEL {text!r}: {attribute}() raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"MODEL {text!r}: {attribute}() returned a {type(model).__name__}; allowed: a "
            "torch.nn.Module"
        )
    return model.eval()


# --- models that are run -------------------------------------------------------------------------


class Runner(Protocol):
    """A model that runs on arrays.

    Attributes:
        kind: ``float``, ``deploy``, ``fake-quant``, ``QDQ``, ``modified`` or ``torch``.
        runtime: what runs it.
        inputs: what it takes.
        output_names: names of its outputs; empty before the first run of a torch model.
        bytes: its size on disk, or that of its parameters.
    """

    kind: str
    runtime: str
    inputs: list[InputSpec]
    output_names: list[str]
    bytes: int

    def run(self, output_names: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs."""


class _OnnxRunner:
    """An ONNX file in ONNX Runtime, or in the toolkit's own session."""

    def __init__(self, path: Path, what: str, threads: int) -> None:
        from amct_pytorch.cli.kinds import onnx_kind
        from amct_pytorch.export.deploy_session import DeploySession
        from amct_pytorch.export.onnx_file import load_onnx, size_on_disk
        from amct_pytorch.export.runtime import cpu_options, cpu_session

        with kind_told(path, what, "an ONNX model", ONNX_KINDS):
            self.kind = onnx_kind(load_onnx(path, what, tensors_stay=True))
        self.bytes = size_on_disk(path)
        self._session: Any
        if self.kind == "deploy":
            self._session, self.runtime = DeploySession(path, cpu_options(threads)), "DeploySession"
        else:
            try:
                self._session = cpu_session(path, threads)
            except Exception as error:
                raise ExportError(
                    f"{what}: ONNX Runtime cannot load {str(path)!r}: {error}"
                ) from error
            self.runtime = "ONNX Runtime"
        self.inputs = [
            InputSpec(given.name, tuple(given.shape), _numpy_type(given.type))
            for given in self._session.get_inputs()
        ]
        self.output_names = [given.name for given in self._session.get_outputs()]
        self._what = f"{what} {str(path)!r}"

    def run(self, output_names: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs."""
        try:
            return list(self._session.run(output_names, dict(feeds)))
        except Exception as error:
            given = ", ".join(f"{n} {v.dtype} {list(v.shape)}" for n, v in feeds.items())
            raise CalibrationError(
                f"{self._what} cannot be run on the data ({given}): {error}"
            ) from error


def _numpy_type(name: str) -> str:
    inner = name.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(inner, inner)


class TorchRunner:
    """A torch module."""

    kind, runtime = "torch", "torch"

    def __init__(self, module: nn.Module, input_names: Sequence[str], output_names: Sequence[str]):
        self.inputs = [InputSpec(name) for name in input_names]
        self.output_names = list(output_names)
        self.bytes = sum(p.numel() * p.element_size() for p in module.parameters())
        self._module = module

    def run(self, output_names: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, floating ones in float32 or float64."""
        tensors = [torch.from_numpy(np.array(feeds[spec.name])) for spec in self.inputs]
        try:
            with torch.no_grad():
                outputs = list(tensors_in(self._module(*tensors)))
        except Exception as error:
            given = ", ".join(f"{n} {v.dtype} {list(v.shape)}" for n, v in feeds.items())
            raise CalibrationError(
                f"the model cannot be run on the data ({given}): {type(error).__name__}: {error}"
            ) from error
        if not self.output_names:
            self.output_names = [f"output_{i}" for i in range(len(outputs))]
        return [
            (t.float() if t.dtype == torch.bfloat16 else t).detach().cpu().numpy() for t in outputs
        ]


def runner(text: str, what: str, threads: int = 1) -> Runner:
    """The model that a command is to run.

    Args:
        text: an ONNX file of any kind, or ``module:factory``.
        what: the argument's name, for messages.
        threads: of the runtime.

    Raises:
        AmctError: it is not there, cannot be read, or is no model.
    """
    if is_factory(text):
        given = _from_factory(text)
        return TorchRunner(given.module, given.input_names, given.output_names or [])
    path = Path(text)
    if not path.exists():
        raise FileMissingError(f"{what}: there is no file {text!r}")
    return _OnnxRunner(path, what, threads)


def check_same_inputs(first: Runner, second: Runner) -> None:
    """Checks that two models take the same inputs.

    Raises:
        ArgumentTypeError: they do not.
    """
    names = [[spec.name for spec in one.inputs] for one in (first, second)]
    if names[0] != names[1] and "torch" not in (first.kind, second.kind):
        raise ArgumentTypeError(
            f"the models take different inputs: {', '.join(names[0])} and {', '.join(names[1])}"
        )


def check_against_runtime(model: FloatModel, batch: Sequence[np.ndarray]) -> float | None:
    """Checks that the torch module of an ONNX file computes what ONNX Runtime does.

    Args:
        model: read from a file.
        batch: one array for each input.

    Returns:
        SQNR of the output that agrees least, dB; infinite where all are equal; None for a model
        that is not from a file.

    Raises:
        ModelError: they differ; the message says where and how much.
    """
    if model.file is None:
        return None
    from amct_pytorch.observers.statistics import Agreement

    feeds = dict(zip(model.input_names, batch, strict=True))
    meant = _OnnxRunner(model.file, "MODEL", 1).run(None, feeds)
    found = TorchRunner(model.module, model.input_names, model.output_names or []).run(None, feeds)
    worst = float("inf")
    for name, a, b in zip(model.output_names or [], meant, found, strict=True):
        if a.shape != b.shape:
            raise ModelError(
                f"MODEL {str(model.file)!r} is not read rightly: output {name!r} has shape "
                f"{list(b.shape)}, in ONNX Runtime {list(a.shape)}; give the model as "
                "'module:factory', and please report it"
            )
        agreement = Agreement.between(
            torch.from_numpy(np.array(a, np.float64)), torch.from_numpy(np.array(b, np.float64))
        )
        limit = SAME_MODEL_DB.get(a.dtype.name, SAME_MODEL_DEFAULT_DB)
        if agreement.sqnr_db < limit:
            raise ModelError(
                f"MODEL {str(model.file)!r} is not read rightly: output {name!r} agrees with ONNX "
                f"Runtime's to {agreement.sqnr_db:.1f} dB; needed are {limit:.0f}. Give the model "
                "as 'module:factory', and please report it"
            )
        worst = min(worst, agreement.sqnr_db)
    return worst
