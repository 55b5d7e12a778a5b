"""An ONNX graph as a torch module: layers where the toolkit knows them, functions elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from amct_pytorch.importing.registry import OPERATORS, Entry, Operator
from amct_pytorch.importing.values import Value, host, tensor


@dataclass(frozen=True)
class Step:
    """One node of the graph, ready to run.

    Attributes:
        operator: the node.
        inputs: names of its inputs, empty for one that is left out.
        outputs: names of its outputs.
        layer: dotted path of the submodule that computes it from its first input; None: the
            table of operators does.
        last_use: names that nothing needs after it.
    """

    operator: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str | None
    last_use: tuple[str, ...] = ()


class Constants(nn.Module):
    """The constants that functions read, as buffers."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._keys: dict[str, str] = {}
        for name, value in tensors.items():
            key = "".join(c if c.isalnum() else "_" for c in name)
            while hasattr(self, key):
                key += "_"
            self._keys[name] = key
            self.register_buffer(key, value)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name in the file."""
        found: Tensor = getattr(self, self._keys[name])
        return found


def computed(operator: Operator, entry: Entry, values: Sequence[Value]) -> Any:
    """An operator's result from values of any kind."""
    given = [value for value in values if value is not None]
    if entry.on_host is not None and given and all(isinstance(v, np.ndarray) for v in given):
        result = entry.on_host(operator, *values)
        if result is not NotImplemented:
            return result
    device = next((v.device for v in given if isinstance(v, Tensor)), None)
    arguments = [
        value if value is None else host(value) if i in entry.host_inputs else tensor(value, device)
        for i, value in enumerate(values)
    ]
    return entry.on_tensors(operator, *arguments)


class OnnxModule(nn.Module):
    """The model of an ONNX file; made by `importing.reader.read_onnx_module`.

    Its forward takes the graph's inputs in order and returns its output, or a tuple of them.

    Attributes:
        input_names: names of the inputs.
        output_names: names of the outputs.
    """

    def __init__(
        self,
        input_names: Iterable[str],
        output_names: Iterable[str],
        steps: Iterable[Step],
        tensors: Mapping[str, Tensor],
        host_values: Mapping[str, np.ndarray],
        layers: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self._steps = list(steps)
        self._host_values = dict(host_values)
        for path, layer in layers.items():
            _place(self, path, layer)
        self.constants = Constants(tensors)

    @classmethod
    def taking(cls, number: int) -> type[OnnxModule]:
        """The class whose forward says that it takes `number` tensors.

        torch's exporter assigns dynamic axes to the parameters of the signature.
        """
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = ["self", *(f"input_{i}" for i in range(number))]

        def forward(self: OnnxModule, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            return cls.forward(self, *inputs)

        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, positional) for name in names]
        )
        return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__})

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The graph's outputs.

        Raises:
            TypeError: another number of tensors than the graph has inputs.
        """
        if len(inputs) != len(self.input_names):
            raise TypeError(f"{len(inputs)} inputs; the model has {', '.join(self.input_names)}")
        known: dict[str, Value] = dict(zip(self.input_names, inputs, strict=True))
        for step in self._steps:
            if step.layer is not None:
                result = self.get_submodule(step.layer)(tensor(known[step.inputs[0]]))
            else:
                result = self._computed(step, known)
            results = result if isinstance(result, tuple) else (result,)
            known.update(zip(step.outputs, results, strict=False))
            for name in step.last_use:
                known.pop(name, None)
        outputs = tuple(self._output(name, known) for name in self.output_names)
        return outputs[0] if len(outputs) == 1 else outputs

    def _output(self, name: str, known: Mapping[str, Value]) -> Tensor:
        return tensor(known[name]) if name in known else self.constants.tensor(name)

    def _computed(self, step: Step, known: Mapping[str, Value]) -> Any:
        entry = OPERATORS[step.operator.op_type]
        # A constant is a host value where others are: sizes stay numbers.
        on_host = entry.on_host is not None and all(
            isinstance(known.get(name), np.ndarray) or name in self._host_values
            for name in step.inputs
            if name
        )
        values: list[Value] = []
        for position, name in enumerate(step.inputs):
            if not name:
                values.append(None)
            elif name in known:
                values.append(known[name])
            elif on_host or position in entry.host_inputs:
                values.append(self._host_values[name])
            else:
                values.append(self.constants.tensor(name))
        return computed(step.operator, entry, values)


def _place(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Registers a layer under a dotted path, with containers in between."""
    *parents, name = path.split(".")
    for parent in parents:
        child = model._modules.get(parent)
        if child is None:
            child = nn.Module()
            model.add_module(parent, child)
        model = child
    model.add_module(name, layer)


__all__ = ["Constants", "OnnxModule", "Step", "computed"]
