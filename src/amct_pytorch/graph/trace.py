"""Seeing a model by running it: one forward pass, every torch function call written down.

Watching a real run survives any control flow and keeps module names. What is written down
is a flat list of calls over *values*: a value is one content of one tensor, so that an
in-place operation ends one value and begins the next.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from amct_pytorch.errors import ModelError
from amct_pytorch.graph.tensors import ModelInputs, in_own_precision, random_state_kept, tensors_in

TORCH_PACKAGE = torch.__file__.rsplit("/", 1)[0].rsplit("\\", 1)[0]
OWN_PACKAGE = str(Path(__file__).parent.parent)
# Integer operands of at most so many values are kept: indices, permutations.
SMALL = 1 << 16
# Through these Python sees a tensor's values.
LOOKS = frozenset(
    {"__bool__", "__int__", "__index__", "__float__", "item", "tolist", "numpy", "__array__"}
)


@dataclass(frozen=True)
class OpCall:
    """One call of a torch function.

    Attributes:
        index: position in the run.
        function: the function's name, e.g. ``conv2d``.
        scopes: dotted paths of the modules whose forward was running, outermost first.
        inputs: value of each tensor operand, in order.
        outputs: value of each tensor result, in order.
        args: positional arguments with tensors replaced by their `Operand`.
        kwargs: keyword arguments, likewise.
        target: the function itself.
        shapes: shape of each tensor result, in order.
        site: ``file.py:12``, the user's line that made the call; empty if it was torch's own.
    """

    index: int
    function: str
    scopes: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Callable[..., Any] | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    site: str = ""

    def argument(self, position: int, name: str) -> Any:
        """The argument given at `position` or by `name`; None if left out."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name)


@dataclass(frozen=True)
class Operand:
    """A tensor argument of a call.

    Attributes:
        value: the value it held.
        shape: its shape.
        parameter: dotted name if it is a parameter or buffer of the model, else None.
    """

    value: int
    shape: tuple[int, ...]
    parameter: str | None


@dataclass
class Trace:
    """What one run of a model did.

    Attributes:
        ops: every call, in order.
        outputs: values that the model returned.
        runs: how often each module's forward ran, by dotted path.
        from_input: values that depend on the model's inputs.
        parameter_values: value of each parameter or buffer that some call read.
        untraced: values made where torch functions are not seen, each with the values that
            were alive just before, which it may have been made from.
        dtypes: floating types that results had.
        integers: what integer operands held that do not depend on the inputs.
        decisions: scopes of each place where Python looked at a value that depends on the
            inputs (``if x.sum() > 0``), with the number of calls before it.
    """

    ops: list[OpCall] = field(default_factory=list)
    outputs: tuple[int, ...] = ()
    runs: dict[str, int] = field(default_factory=dict)
    from_input: set[int] = field(default_factory=set)
    parameter_values: dict[str, int] = field(default_factory=dict)
    untraced: dict[int, frozenset[int]] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)
    integers: dict[int, Tensor] = field(default_factory=dict)
    decisions: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def consumers(self, value: int) -> list[OpCall]:
        """The calls that read `value`."""
        return [op for op in self.ops if value in op.inputs]

    def reaching_output(self) -> set[int]:
        """The values that the model's output is computed from.

        An untraced value may come from anything before it, so all of that counts.
        """
        if not self.outputs:
            return {value for op in self.ops for value in op.outputs}
        needed = set(self.outputs)
        anything = not needed.isdisjoint(self.untraced)
        for op in reversed(self.ops):
            if anything or not needed.isdisjoint(op.outputs):
                needed.update(op.outputs)
                needed.update(op.inputs)
                anything |= not self.untraced.keys().isdisjoint(op.inputs)
        return needed

    def in_scope(self, path: str) -> Iterator[OpCall]:
        """The calls made while the forward of module `path` was running."""
        return (op for op in self.ops if path in op.scopes)


class _Recorder(TorchFunctionMode):
    """Writes every torch function call into a `Trace`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.scopes: list[str] = []
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._alive: frozenset[int] = frozenset()
        self._next_value = 0
        named = [*model.named_parameters(), *model.named_buffers()]
        # The model keeps these alive, so that their ids are theirs.
        self._parameters = {id(tensor): name for name, tensor in named}
        self._parameter_values: dict[int, int] = {}

    def name_inputs(self, inputs: ModelInputs) -> None:
        for tensor in tensors_in((inputs.args, inputs.kwargs)):
            self.trace.from_input.add(self._renew(tensor))
        self._alive = frozenset(self._values.values())

    def name_outputs(self, outputs: Any) -> None:
        self.trace.outputs = tuple(self._value(tensor) for tensor in tensors_in(outputs))

    def _renew(self, tensor: Tensor) -> int:
        value, self._next_value = self._next_value, self._next_value + 1
        if id(tensor) in self._parameters:
            self._parameter_values[id(tensor)] = value
        else:
            self._values[tensor] = value
        return value

    def _value(self, tensor: Tensor) -> int:
        parameter = self._parameters.get(id(tensor))
        if parameter is None:
            value = self._values.get(tensor)
        else:
            value = self._parameter_values.get(id(tensor))
        if value is not None:
            return int(value)
        value = self._renew(tensor)
        if parameter is None:
            # Made where torch functions are not seen (a custom autograd function, a
            # compiled extension): it may depend on the input, so say that it does.
            self.trace.from_input.add(value)
            self.trace.untraced[value] = self._alive
        else:
            self.trace.parameter_values[parameter] = value
        return value

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self._parameters.get(id(value))
            number = self._value(value)
            fixed = name is not None or number not in self.trace.from_input
            if fixed and not value.is_floating_point() and value.numel() <= SMALL:
                self.trace.integers[number] = value.detach().clone()
            return Operand(number, tuple(value.shape), name)
        if isinstance(value, (list, tuple)):
            items = (self._operand(item) for item in value)
            return tuple(items) if isinstance(value, tuple) else list(items)
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        sources = list(tensors_in((args, kwargs)))
        inputs = tuple(self._value(tensor) for tensor in sources)
        operands = tuple(self._operand(arg) for arg in args)
        named = {key: self._operand(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        changed = list(tensors_in(result))
        if name == "__setitem__":
            changed.append(sources[0])
        if changed:
            outputs = tuple(self._renew(tensor) for tensor in changed)
            self.trace.dtypes.update(t.dtype for t in changed if t.is_floating_point())
            if any(value in self.trace.from_input for value in inputs):
                self.trace.from_input.update(outputs)
            index = len(self.trace.ops)
            shapes = tuple(tuple(tensor.shape) for tensor in changed)
            scopes = tuple(self.scopes)
            self.trace.ops.append(
                OpCall(index, name, scopes, inputs, outputs, operands, named, func, shapes, _site())
            )
            self._alive = frozenset(self._values.values())
        elif name in LOOKS and any(value in self.trace.from_input for value in inputs):
            self.trace.decisions.append((len(self.trace.ops), tuple(self.scopes)))
        return result


def _site() -> str:
    """The innermost line outside torch and the toolkit that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith((TORCH_PACKAGE, OWN_PACKAGE)):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextmanager
def _scopes_watched(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keeps the recorder's stack of running modules while the model runs."""
    handles = []
    for path, module in model.named_modules():

        def enter(_: nn.Module, __: Any, path: str = path) -> None:
            recorder.scopes.append(path)
            recorder.trace.runs[path] = recorder.trace.runs.get(path, 0) + 1

        def leave(_: nn.Module, __: Any, ___: Any, path: str = path) -> None:
            if recorder.scopes[-1:] == [path]:
                recorder.scopes.pop()

        handles.append(module.register_forward_pre_hook(enter))
        # Also where a forward raises and its caller goes on; it may not even have begun then.
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def where_it_failed(
    model: nn.Module,
    error_traceback: TracebackType | None,
    names: Mapping[nn.Module, str] = MappingProxyType({}),
) -> str:
    """``in module 'a.b' (file.py:12)``: the deepest module and user line of a traceback.

    Args:
        model: the model that ran.
        error_traceback: of the error.
        names: modules that the user knows by another name than their path in `model`.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    paths.update({id(module): name for module, name in names.items()})
    module_path, line = "", ""
    for frame, number in traceback.walk_tb(error_traceback):
        path = paths.get(id(frame.f_locals.get("self")))
        module_path = path or module_path
        filename = frame.f_code.co_filename
        if path is not None and not filename.startswith((TORCH_PACKAGE, OWN_PACKAGE)):
            line = f"{filename}:{number}"
    place = f"in module {module_path!r}" if module_path else "in the model's forward"
    return f"{place} ({line})" if line else place


def trace_forward(model: nn.Module, inputs: ModelInputs) -> Trace:
    """Runs `model` once on `inputs` and returns what it did.

    The model's buffers may change, as in any forward; give a copy. It runs in the mode it
    is in, without gradients, on copies of the inputs.

    Raises:
        ModelError: the forward raised; the message names the module, the user's line and
            what to look at.
    """
    trace, error = trace_until(model, inputs)
    if error is not None:
        raise ModelError(
            f"the model cannot be run on input_data: {type(error).__name__} "
            f"{where_it_failed(model, error.__traceback__)}: {error}. "
            "Check that model(*input_data) works by itself."
        ) from error
    return trace


def trace_until(model: nn.Module, inputs: ModelInputs) -> tuple[Trace, Exception | None]:
    """As `trace_forward`: what a model did until it was done or raised, and what it raised."""
    recorder = _Recorder(model)
    inputs = inputs.copied()
    recorder.name_inputs(inputs)
    try:
        with (
            in_own_precision(model),
            random_state_kept(model),
            _scopes_watched(model, recorder),
            recorder,
        ):
            outputs = inputs.call(model)
    except Exception as error:
        return recorder.trace, error
    recorder.name_outputs(outputs)
    return recorder.trace, None
