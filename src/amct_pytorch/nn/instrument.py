"""Putting the toolkit's modules into a copy of the user's model: the one place that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_pytorch.algorithms.balance import balanced_weight
from amct_pytorch.errors import ModelError
from amct_pytorch.graph.layers import LAYER_KINDS, SeenLayer
from amct_pytorch.graph.look import ModelGraph, copy_model, copy_sharing_weights, kind_of
from amct_pytorch.graph.tensors import (
    ModelInputs,
    in_own_precision,
    random_state_kept,
    tensors_in,
)
from amct_pytorch.graph.trace import Operand
from amct_pytorch.nn.fuse_norm import SkippedNorm, fuse_norm
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.wrapped import CompressedLayer, Wrapped, compressed_layers, replace_modules
from amct_pytorch.observers.statistics import Agreement

# A folded BatchNorm moves the result by its rounding, above 100 dB in float32; each layer in
# half precision adds its own, about -70 and -50 dB.
SAME_DB = {torch.float32: 60.0, torch.float16: 30.0, torch.bfloat16: 12.0}


def instrument(
    model: nn.Module,
    graph: ModelGraph,
    inputs: ModelInputs,
    names: Iterable[str],
    fused: Mapping[str, str],
    balance: Mapping[str, Tensor] = MappingProxyType({}),
    rescale: Callable[[dict[str, CompressedLayer]], object] | None = None,
) -> nn.Module:
    """A copy of `model` in eval mode with each named layer made a `CompressedLayer`.

    Args:
        model: the user's model, left as it is.
        graph: what a look at it found.
        inputs: arguments to run it on, where a layer computes its weight in its forward.
        names: the layers to wrap, all quantizable.
        fused: BatchNorm module to fold into each layer, by layer name; it is then skipped.
        balance: what the weights of each input channel are multiplied by and its inputs divided
            by, [in_channels] by layer name.
        rescale: may change the layers in ways that leave the float result as it is.

    Raises:
        ModelError: a weight, bias or BatchNorm holds NaN or infinity, or the model cannot be
            copied or run, or its modules are not held where they can be replaced.
    """
    # Each run gets a copy of its own: a forward may change buffers and attributes.
    original = _outputs(copy_model(model), inputs)
    copied = copy_model(model)
    wanted = set(names)
    layers = [layer for layer in graph.layers if layer.name in wanted]
    operands = call_operands(copied, model, graph, inputs, layers)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        weight, bias = operands[layer.name]
        kind = LAYER_KINDS[layer.kind]
        check_finite(layer.name, weight, bias)
        norm_name = fused.get(layer.name)
        if norm_name is not None:
            norm = copied.get_submodule(norm_name)
            assert isinstance(norm, _BatchNorm)
            fused_weight, bias = fuse_norm(weight, bias, norm, kind.layout(layer.groups))
            check_finite(f"{layer.name} with {norm_name} fused", fused_weight, bias)
            if fused_weight.dtype == weight.dtype:
                with torch.no_grad():
                    weight.copy_(fused_weight)
            else:
                weight = fused_weight
            replacements[norm] = SkippedNorm(norm)
        factors = balance.get(layer.name)
        if factors is not None:
            balanced = balanced_weight(kind.layout(layer.groups), layer.groups, weight, factors)
            check_finite(f"{layer.name} after balancing", balanced, None)
            weight = balanced
        module = copied.get_submodule(layer.name)
        replacements[module] = CompressedLayer(
            layer.name, kind, module, weight, bias, layer.groups, factors
        )
    replace_modules(copied, replacements)
    if rescale is not None:
        rescale(compressed_layers(copied))
    same_db = min(SAME_DB.get(dtype, 60.0) for dtype in graph.trace.dtypes | {torch.float32})
    _check_same(original, _outputs(copy_sharing_weights(copied), inputs), same_db)
    return copied


def _outputs(model: nn.Module, inputs: ModelInputs) -> list[Tensor]:
    with in_own_precision(model), random_state_kept(model):
        return [tensor.detach() for tensor in tensors_in(inputs.copied().call(model))]


def _check_same(original: list[Tensor], instrumented: list[Tensor], same_db: float) -> None:
    """Finds modules that could not be replaced everywhere: the float result changes then."""
    for a, b in zip(original, instrumented, strict=False):
        if not a.is_floating_point() or not bool(torch.isfinite(a).all()):
            continue
        agreement = Agreement.between(a, b)
        if agreement.sqnr_db < same_db:
            raise ModelError(
                "putting the toolkit's modules in changes the float result (SQNR "
                f"{agreement.sqnr_db:.1f} dB to the original). The forward probably calls a "
                "layer or a BatchNorm through a reference that is not a submodule, list or dict "
                "(functools.partial, a helper object); call it as an attribute of its module, or "
                "name its layer in skip_fusion_layers"
            )


def call_operands(
    copied: nn.Module,
    model: nn.Module,
    graph: ModelGraph,
    inputs: ModelInputs,
    layers: Sequence[SeenLayer],
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias operand of each layer's call, by layer name.

    Args:
        copied: a copy of `model`, whose parameters are given where they are the operands.
        model: the model; it is copied once more and run where a layer computes its operands.
        graph: what a look at it found.
        inputs: arguments to run it on.
        layers: the layers wanted, each with one call within reach.
    """
    operands = _operands(copied, graph, layers)
    computed = [layer.name for layer in layers if layer.name not in operands]
    if computed:
        operands |= _captured(copy_model(model), inputs, computed)
    return operands


def _operands(
    model: nn.Module, graph: ModelGraph, layers: Iterable[SeenLayer]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias operand of each layer's call, where both are parameters or there are none."""
    parameters = dict(model.named_parameters())
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for layer in layers:
        if not LAYER_KINDS[layer.kind].weighted:
            found[layer.name] = (torch.empty(0), None)
            continue
        call = graph.calls[layer.name]
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        names = [op.parameter for op in (weight, bias) if isinstance(op, Operand)]
        if all(name in parameters for name in names):
            tensors = [parameters[name] for name in names if name is not None]
            found[layer.name] = (tensors[0], tensors[1] if len(tensors) > 1 else None)
    return found


class _Capture(Wrapped):
    """Runs a layer as it is and keeps the operands of its call."""

    operands: tuple[Tensor, Tensor | None] | None = None

    def answer(self, call: LayerCall) -> Tensor:
        bias = None if call.bias is None else call.bias.detach().clone()
        assert call.weight is not None
        self.operands = (call.weight.detach().clone(), bias)
        return call.run(call.x, call.weight, call.bias)


def _captured(
    model: nn.Module, inputs: ModelInputs, names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The operands that layers compute in their forward (weight standardisation, say)."""
    originals = {name: model.get_submodule(name) for name in names}
    captures = {name: _Capture(module, _functions(module)) for name, module in originals.items()}
    replace_modules(model, {originals[name]: captures[name] for name in names})
    try:
        with in_own_precision(model), random_state_kept(model):
            inputs.copied().call(model)
    finally:
        replace_modules(model, {captures[name]: originals[name] for name in names})
    operands = {}
    for name, capture in captures.items():
        if capture.operands is None:
            raise ModelError(f"layer {name!r} ran in one forward of the model and not in the next")
        operands[name] = capture.operands
    return operands


def _functions(module: nn.Module) -> tuple[str, ...]:
    kind = kind_of(module)
    assert kind is not None
    return kind.functions


def check_finite(name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Refuses operands of a layer that hold NaN or infinity.

    Raises:
        ModelError: naming the layer and how many there are.
    """
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or bool(torch.isfinite(tensor).all()):
            continue
        number = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"the {what} of layer {name!r} holds {number} values that are NaN or infinite; "
            "load a sound checkpoint, or skip the layer"
        )
