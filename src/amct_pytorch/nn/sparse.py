"""Layers that are trained with 2:4 sparse weights.

A module becomes one of a class made from its own: it keeps its place, its name, its forward, its
parameters and their names, and whatever is registered on it, so that optimizers, checkpoints,
`DistributedDataParallel` and a quantizer that is put around it see an ordinary layer. Its one
convolution or linear call is answered with the sparse weight.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from amct_pytorch.algorithms.two_of_four import two_of_four_mask
from amct_pytorch.graph.layers import LayerKind
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.intercept import CallInterceptor, LayerCall
from amct_pytorch.nn.wrapped import keep_off_shortcuts

MASK = "sparse_mask"


class TwoOfFourLayer(nn.Module):
    """What a module's class is extended by; see `make_sparse`.

    In training mode the weights that stay are selected anew in the first batch, and then every
    `update_freq` batches if that is not 0. Gradients go to all weights, as if the call had been
    made with the dense ones.

    Attributes:
        sparse_mask: buffer, bool, of the weight's shape: what stays.
        sparse_batches: training batches seen so far; in the state dict.
        update_freq: see above.
        functions: names of the torch functions that the layer's call may be.
        sparse_layout: which axis of the weight counts what.
        dense_class: what the module's class was made from.
    """

    sparse_mask: Tensor
    sparse_batches: int
    update_freq: int
    functions: tuple[str, ...]
    sparse_layout: WeightLayout
    dense_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its call made with the sparse weight."""
        with CallInterceptor(self.functions, self._answer):
            result = super().forward(*args, **kwargs)
        if self.training:
            self.sparse_batches += 1
        return result

    def _answer(self, call: LayerCall) -> Tensor:
        assert call.weight is not None
        if self.training and self._due():
            self.sparse_mask.copy_(two_of_four_mask(call.weight.detach(), self.sparse_layout))
        return call.run(call.x, masked(call.weight, self.sparse_mask), call.bias)

    def _due(self) -> bool:
        """Whether this training batch selects anew."""
        if self.sparse_batches == 0:
            return True
        return self.update_freq > 0 and self.sparse_batches % self.update_freq == 0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}sparse_batches"] = torch.tensor(self.sparse_batches)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}sparse_batches"
        _, strict, missing, *_ = rest
        if key in state_dict:
            self.sparse_batches = int(state_dict[key])
        elif strict:
            missing.append(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        unexpected = rest[3]
        if key in unexpected:
            unexpected.remove(key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be found by: a copy or pickle makes it again.
        reduced = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if "dense_class" not in vars(type(self)):
            return reduced
        return (_new, (self.dense_class,), *reduced[2:])


class _StraightThrough(torch.autograd.Function):
    """The masked weight, with the gradient of the dense one."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Any:
        return grads[0], None


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """weight * mask, whose gradient goes to all weights (straight-through)."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return weight * mask  # seen by whoever watches torch functions
    return cast(Tensor, _StraightThrough.apply(weight, mask))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _sparse_class(dense: type[nn.Module]) -> type[nn.Module]:
    """The class of sparse layers whose dense class is `dense`; one for all layers of a class."""
    if dense not in _CLASSES:
        body = {"__doc__": dense.__doc__, "dense_class": dense}
        _CLASSES[dense] = type(f"Sparse{dense.__name__}", (TwoOfFourLayer, dense), body)
    return _CLASSES[dense]


def _new(dense: type[nn.Module]) -> nn.Module:
    """An empty module of the sparse class; for copies and pickles."""
    kind = _sparse_class(dense)
    return kind.__new__(kind)


def make_sparse(module: nn.Module, kind: LayerKind, mask: Tensor, update_freq: int) -> None:
    """Gives a layer 2:4 sparse weights, in place.

    Args:
        module: a layer of that kind whose forward makes one call.
        kind: its row of the layer table.
        mask: what stays until the first training batch, bool, of the weight operand's shape.
        update_freq: batches between two selections; 0: only one, in the first batch.
    """
    module.__class__ = _sparse_class(type(module))
    sparse = cast(TwoOfFourLayer, module)
    sparse.register_buffer(MASK, mask)
    sparse.sparse_batches = 0
    sparse.update_freq = update_freq
    sparse.functions = kind.functions
    sparse.sparse_layout = kind.layout(int(getattr(module, "groups", 1)))
    keep_off_shortcuts(module)


def sparse_layers(model: nn.Module) -> dict[str, TwoOfFourLayer]:
    """Every 2:4 sparse layer of a model by its path, in module order."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, TwoOfFourLayer)
    }
