"""Looking at a model: which layers there are, what can be quantized, what can be fused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from amct_pytorch.errors import ArgumentTypeError, ModelError
from amct_pytorch.graph.layers import CALIBRATED_KINDS, LAYER_KINDS, LayerKind, SeenLayer
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import OpCall, Operand, Trace, trace_forward

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OtherModule:
    """A module with weights of its own that is no layer of a known kind.

    Attributes:
        name: dotted module path.
        type: its class's name.
        parameters: number of its weights.
    """

    name: str
    type: str
    parameters: int


@dataclass(frozen=True)
class ModelGraph:
    """What one look at a model found.

    Attributes:
        layers: every layer of a known kind, quantizable or not, in module order.
        others: modules of other kinds that hold weights, which stay as they are.
        fusable_norms: BatchNorm module directly behind a layer and behind nothing else,
            by layer name.
        calls: the one call of each layer that made exactly one, in the order they ran.
        module_names: every dotted module path of the model.
        trace: the run itself.
    """

    layers: tuple[SeenLayer, ...]
    others: tuple[OtherModule, ...]
    fusable_norms: dict[str, str]
    calls: dict[str, OpCall]
    module_names: tuple[str, ...]
    trace: Trace


def check_model(model: object) -> None:
    """Refuses what is no module, or one whose layers or weights cannot be seen.

    Raises:
        ArgumentTypeError: `model` is no module.
        ModelError: it is wrapped, scripted or traced, or a lazy layer of it has no values yet.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed is a torch.nn.Module with its weights"
        )
    inner = _wrapped_in(model)
    if inner is not None:
        raise ModelError(
            f"model is wrapped in {type(model).__name__}; give the module inside it, model.{inner}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is a scripted or traced module, whose layers cannot be seen; give the "
            "torch.nn.Module it was made from"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{name!r} has no values yet: it belongs to a lazy layer; run it once before, "
                "with model(*input_data)"
            )


def _wrapped_in(model: nn.Module) -> str | None:
    """Where a wrapper that hides its module holds it; None for any other module."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    # Imported by whoever compiled the model; importing it here would take seconds.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return "_orig_mod"
    return None


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode.

    Raises:
        ArgumentTypeError: `model` is no module.
        ModelError: it cannot be copied; the message says why.
    """
    return copy_with(model, {}).eval()


def copy_with(model: nn.Module, others: Mapping[Tensor, Tensor]) -> nn.Module:
    """A deep copy, in the same mode, that has other tensors in the place of some.

    Raises:
        ArgumentTypeError: `model` is no module.
        ModelError: it cannot be copied; the message says why.
    """
    check_model(model)
    try:
        return copy.deepcopy(model, {id(one): other for one, other in others.items()})
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied (copy.deepcopy): {type(error).__name__}: {error}. "
            "The caller's model is never changed, so a copy is needed; remove attributes that "
            "cannot be copied, such as non-leaf tensors, locks or open files."
        ) from error


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, for one run of a model of the toolkit's own.

    Buffers and attributes, which a forward may change, are copies.
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def look_at(
    model: nn.Module, inputs: ModelInputs, kinds: Collection[str] = CALIBRATED_KINDS
) -> ModelGraph:
    """Runs a copy of `model` once on `inputs` and reports its layers.

    Args:
        model: left untouched.
        inputs: that it can be run on.
        kinds: names of the types of layers to report; modules of others count as operators.

    Raises:
        ArgumentTypeError: `model` is no module.
        ModelError: it cannot be copied or run.
    """
    watched = copy_model(model)
    trace = trace_forward(watched, inputs)
    sharing = shared_owners(model)
    used = trace.reaching_output()
    layers = []
    calls: dict[str, OpCall] = {}
    for path, module in watched.named_modules():
        kind = kind_of(module)
        if kind is None or kind.name not in kinds:
            continue
        own_calls = _own_calls(trace, path, kind)
        unreachable = _why_unreachable(path, module, kind, own_calls, trace, sharing)
        if unreachable is None and own_calls[0].outputs[0] not in used:
            unreachable = "its output is not used for the model's output"
        reason = unreachable or _why_not_quantized(module, kind, own_calls[0])
        if len(own_calls) == 1:
            calls[path] = own_calls[0]
        layer = _describe(path, module, kind, reason, own_calls)
        layers.append(replace(layer, unreachable=unreachable))
    calls = dict(sorted(calls.items(), key=lambda item: item[1].index))
    quantizable = {layer.name: calls[layer.name] for layer in layers if layer.quantizable}
    return ModelGraph(
        tuple(layers),
        tuple(_other_modules(watched, kinds)),
        _find_fusable_norms(watched, trace, quantizable),
        calls,
        tuple(path for path, _ in model.named_modules() if path),
        trace,
    )


def _other_modules(model: nn.Module, kinds: Collection[str]) -> Iterator[OtherModule]:
    for path, module in model.named_modules():
        weights = [p.numel() for p in module.parameters(recurse=False) if p.dim() > 1]
        kind = kind_of(module)
        if weights and (kind is None or kind.name not in kinds):
            yield OtherModule(path, type(module).__name__, sum(weights))


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of layer that `module` is, or None."""
    for kind in LAYER_KINDS.values():
        if isinstance(module, kind.module_class):
            return kind
    return None


def layer_calls(trace: Trace, layers: Iterable[SeenLayer]) -> dict[str, OpCall]:
    """The one call of each layer that made exactly one in a run, in the order they ran."""
    found = {}
    for layer in layers:
        calls = _own_calls(trace, layer.name, LAYER_KINDS[layer.kind])
        if len(calls) == 1:
            found[layer.name] = calls[0]
    return dict(sorted(found.items(), key=lambda item: item[1].index))


def _own_calls(trace: Trace, path: str, kind: LayerKind) -> list[OpCall]:
    return [op for op in trace.in_scope(path) if op.function in kind.functions and _owns(op, path)]


def _owns(op: OpCall, path: str) -> bool:
    """Whether the call was made in the forward of module `path` or of its own submodules."""
    inner = op.scopes[op.scopes.index(path) + 1 :]
    return all(scope.startswith(f"{path}.") for scope in inner)


def shared_owners(model: nn.Module) -> dict[str, str]:
    """For each module path that shares a parameter's memory: a name it shares with."""
    spans = []
    # By module, so that one module registered under two names does not count as two.
    named = [
        (f"{path}.{key}" if path else key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    for name, parameter in named:
        if parameter.numel() and parameter.device.type != "meta":
            start = parameter.data_ptr()
            size = parameter.numel() * parameter.element_size()
            spans.append((str(parameter.device), start, start + size, name))
    shared: dict[str, str] = {}
    reach = ("", 0, "")
    for device, start, end, name in sorted(spans):
        # Sorted by start, a span overlaps an earlier one iff it begins before the furthest end.
        if reach[0] == device and start < reach[1]:
            shared.setdefault(name.rpartition(".")[0], reach[2])
            shared.setdefault(reach[2].rpartition(".")[0], name)
        if reach[0] != device or end > reach[1]:
            reach = (device, end, name)
    return shared


def _why_unreachable(
    path: str,
    module: nn.Module,
    kind: LayerKind,
    calls: list[OpCall],
    trace: Trace,
    sharing: dict[str, str],
) -> str | None:
    """The reason why a layer's one call cannot be answered in its place, or None."""
    if not path:
        return "the model itself is this layer; put it into a module, e.g. nn.Sequential(layer)"
    if path in sharing:
        return f"reused layer: it shares memory with {sharing[path]!r}"
    runs = trace.runs.get(path, 0)
    if runs == 0:
        readers = [
            op
            for name, value in trace.parameter_values.items()
            if name.rpartition(".")[0] == path
            for op in trace.consumers(value)
        ]
        if readers:
            return f"its forward did not run; {readers[0].function} read its parameters directly"
        return "it did not run on input_data"
    if runs > 1:
        return f"reused layer: it ran {runs} times in one forward"
    if len(calls) != 1:
        names = " or ".join(kind.functions)
        return f"its forward called {names} {len(calls)} times; exactly one call is supported"
    call = calls[0]
    for scope in call.scopes[call.scopes.index(path) + 1 :]:
        if kind_of(module.get_submodule(scope[len(path) + 1 :])) is not None:
            return f"its call is made by layer {scope!r} inside it"
    x = call.argument(0, "input")
    if not isinstance(x, Operand):
        return "its call has no tensor as input"
    return _why_not_its_weight(module, call, trace) if kind.weighted else None


def _why_not_quantized(module: nn.Module, kind: LayerKind, call: OpCall) -> str | None:
    """The reason why a layer cannot be quantized though its call is within reach, or None."""
    x = call.argument(0, "input")
    assert isinstance(x, Operand)
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode is {getattr(module, 'padding_mode', None)!r}; supported is 'zeros'"
    rank = len(x.shape)
    low, high = kind.input_ranks
    if not low <= rank <= high:
        allowed = f"{low}-D" if low == high else f"{low}-D to {high}-D"
        return f"its input is {rank}-D; supported is {allowed}"
    return kind.limits(module)


def _why_not_its_weight(module: nn.Module, call: OpCall, trace: Trace) -> str | None:
    weight = call.argument(1, "weight")
    if not isinstance(weight, Operand):
        return "its call has no tensor as weight"
    dtype = getattr(module.weight, "dtype", torch.float32)
    if dtype not in SUPPORTED_DTYPES:
        return f"its weight is {dtype}; supported are {', '.join(map(str, SUPPORTED_DTYPES))}"
    if weight.value in trace.from_input:
        return "its weight is computed from the model's input"
    others = [op for op in trace.consumers(weight.value) if op.index != call.index]
    if weight.parameter is not None and others:
        return f"reused layer: its weight is also read by {others[0].function}"
    return None


def _describe(
    path: str, module: nn.Module, kind: LayerKind, reason: str | None, calls: list[OpCall]
) -> SeenLayer:
    groups = int(getattr(module, "groups", 1))
    x = calls[0].argument(0, "input") if len(calls) == 1 else None
    input_shape = x.shape if isinstance(x, Operand) else ()
    if not kind.weighted:
        return SeenLayer(path, kind.name, reason, 0, groups, (), input_shape)
    weight = calls[0].argument(1, "weight") if len(calls) == 1 else None
    if isinstance(weight, Operand):
        shape = weight.shape
    else:
        shape = tuple(getattr(module, "weight", None).shape)  # type: ignore[union-attr]
    in_channels = int(getattr(module, "in_channels", getattr(module, "in_features", 0)))
    return SeenLayer(path, kind.name, reason, in_channels, groups, shape, input_shape)


def _find_fusable_norms(model: nn.Module, trace: Trace, calls: dict[str, OpCall]) -> dict[str, str]:
    """Layers whose output goes into one BatchNorm in inference form and nowhere else."""
    found = {}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, call in calls.items():
        kind = LAYER_KINDS[next(k for k, v in LAYER_KINDS.items() if call.function in v.functions)]
        if kind.channel_axis != 1 or not kind.weighted:
            continue
        (value,) = call.outputs
        readers = trace.consumers(value)
        if len(readers) != 1 or value in trace.outputs:
            continue
        (norm_call,) = readers
        if norm_call.function != "batch_norm" or not norm_call.scopes:
            continue
        norm_path = norm_call.scopes[-1]
        norm = model.get_submodule(norm_path)
        if (
            isinstance(norm, _BatchNorm)
            and norm.running_mean is not None
            and trace.runs[norm_path] == 1
            and _normalizes_as_it_says(tensors, norm, norm_call)
        ):
            found[path] = norm_path
    return found


def _normalizes_as_it_says(tensors: Mapping[str, Tensor], norm: _BatchNorm, call: OpCall) -> bool:
    """Whether a batch_norm call uses just what its module holds, in inference form."""
    for position, name in enumerate(("running_mean", "running_var", "weight", "bias"), start=1):
        operand, held = call.argument(position, name), getattr(norm, name)
        used = tensors.get(operand.parameter or "") if isinstance(operand, Operand) else operand
        if used is not held:
            return False
    eps = call.argument(7, "eps")
    return not call.argument(5, "training") and (1e-5 if eps is None else eps) == norm.eps
