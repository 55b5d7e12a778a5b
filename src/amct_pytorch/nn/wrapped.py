"""Modules that stand in a layer's place and keep the layer's own forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.graph.layers import LayerKind
from amct_pytorch.nn.intercept import CallInterceptor, LayerCall

# Name of the submodule that holds the user's own module.
INNER = "layer"


def file_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that operands of a layer of this type have in the files made from it.

    Runtimes do without bfloat16, so its layers are float32 there; operands that the toolkit
    computes are then kept in float32 too.
    """
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _seen(_: nn.Module, __: Any) -> None:
    """A hook that does nothing, and by being there keeps torch off its shortcuts.

    nn.TransformerEncoderLayer would read the weights of its Linears and never run them.
    """


def keep_off_shortcuts(module: nn.Module) -> None:
    """Has torch run the module's forward, where it would read the module's weight instead."""
    module.register_forward_pre_hook(_seen)


class Wrapped(nn.Module):
    """Stands in for a module, runs its forward and answers some of its torch calls.

    Attributes that are not found here are looked up on the wrapped module, so that code of
    the user's that reads ``self.conv.stride`` goes on working.

    Args:
        layer: the user's module.
        functions: names of the torch functions to answer.
        own: parameters of the stand-in itself, by name.
    """

    def __init__(self, layer: nn.Module, functions: tuple[str, ...], **own: nn.Parameter) -> None:
        super().__init__()
        self.functions = functions
        # Before the layer: from then on its attributes of the same names are found too.
        for name, parameter in own.items():
            self.register_parameter(name, parameter)
        self.layer = layer
        keep_off_shortcuts(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Special methods are looked up on the class; the inner module's are its own.
            if name == INNER or name.startswith("__"):
                raise
            return getattr(super().__getattr__(INNER), name)

    def answer(self, call: LayerCall) -> Tensor:
        """What the caught call returns."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward with its call answered."""
        with CallInterceptor(self.functions, self.answer):
            return self.layer(*args, **kwargs)


class LayerStandIn(Wrapped):
    """A stand-in for a layer of a known kind.

    Args:
        kind: its row of the layer table.
        layer: see `Wrapped`.
        own: see `Wrapped`.
    """

    def __init__(self, kind: LayerKind, layer: nn.Module, **own: nn.Parameter) -> None:
        super().__init__(layer, kind.functions, **own)
        self.kind = kind

    def per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """One value per channel, shaped to broadcast over the layer's input or output."""
        shape = [1] * x.dim()
        shape[self.kind.channel_axis] = -1
        return values.view(shape)


class CompressedLayer(LayerStandIn):
    """A layer whose operands the toolkit owns.

    Holds the layer's final `weight` and `bias` (after fusion) and uses them in the layer's
    one call, whatever weight its own forward computed. What happens in that call is up to
    the `stage`, which the calibration flow sets; without one it is the float call.

    Args:
        name: the layer's dotted path.
        kind: its row of the layer table.
        layer: the user's module.
        weight: weight operand of its call; empty for a layer without weights.
        bias: bias operand or None, which becomes zeros so that a correction has a place; held
            in `file_dtype`.
        groups: groups of a convolution.
        balance: what each input channel's weights are multiplied by and its inputs divided by,
            [in_channels]; None: nothing.

    Attributes:
        tensor_balance_factor: 1 / balance, shaped to broadcast over the input; None without.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    tensor_balance_factor: nn.Parameter | None

    def __init__(
        self,
        name: str,
        kind: LayerKind,
        layer: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        groups: int = 1,
        balance: Tensor | None = None,
    ) -> None:
        layout = kind.layout(groups) if kind.weighted else None
        own_weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        own_weight.requires_grad_(False)
        if bias is None:
            bias = weight.new_zeros(layout.channels(weight.shape) if layout else 0)
        bias = bias.detach().to(file_dtype(bias.dtype), copy=True)
        super().__init__(
            kind,
            layer,
            weight=own_weight,
            bias=nn.Parameter(bias, requires_grad=False),
        )
        self.name = name
        self.groups = groups
        self.tensor_balance_factor = None
        if balance is not None:
            inverse = 1 / balance.to(own_weight.device, torch.float32)
            # The file has this tensor under this name.
            shape = (1, -1) if kind.channel_axis == -1 else (1, -1, *[1] * (weight.dim() - 2))
            held = nn.Parameter(inverse.view(shape), requires_grad=False)
            self.tensor_balance_factor = held
        self.layout = layout
        self.stage: Stage | None = None

    def per_output(self, values: Tensor) -> Tensor:
        """One value (or one per output channel), shaped to broadcast over the weight."""
        if self.layout is None:
            return values
        return self.layout.along_channels(values, self.weight.shape)

    def answer(self, call: LayerCall) -> Tensor:
        """The call on the toolkit's operands, by the stage if there is one."""
        if self.tensor_balance_factor is not None:
            call = replace(call, x=call.x * self.tensor_balance_factor.to(call.x.dtype))
        return self.float_result(call) if self.stage is None else self.stage.run(self, call)

    def float_result(self, call: LayerCall) -> Tensor:
        """The call on the layer's float operands, in the type that its own have."""
        dtype = self.weight.dtype if call.weight is None else call.weight.dtype
        if dtype == self.weight.dtype == self.bias.dtype:
            return call.run(call.x, self.weight, self.bias)
        return call.run(call.x, self.weight.to(dtype), self.bias.to(dtype))


class Stage:
    """What a `CompressedLayer` does with its call during one phase of a flow."""

    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The call's result."""
        raise NotImplementedError


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """Every `CompressedLayer` in `model` by layer name, in module order."""
    return {
        module.name: module for module in model.modules() if isinstance(module, CompressedLayer)
    }


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts modules in the place of others, wherever `model` holds those.

    That is under every name they are registered by, and in the lists, tuples and dicts that
    its modules have as plain attributes.
    """
    for parent in list(model.modules()):
        attributes = vars(parent)
        for name, value in list(attributes.items()):
            attributes[name] = _replaced(value, replacements)


def _replaced(value: Any, replacements: Mapping[nn.Module, nn.Module]) -> Any:
    """`value` with modules replaced: lists and dicts in place, tuples anew."""
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _replaced(item, replacements)
    elif isinstance(value, list):
        value[:] = [_replaced(item, replacements) for item in value]
    elif type(value) is tuple:
        items = tuple(_replaced(item, replacements) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
