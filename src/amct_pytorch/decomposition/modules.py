"""The modules that take a layer's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from amct_pytorch.decomposition.geometry import Geometry, Split, axis_owners
from amct_pytorch.nn.wrapped import replace_modules

# What nn.Module keeps forward and backward hooks in; they see the same input and output as before.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def build_pieces(
    conv: nn.Conv2d, split: Split, weights: Sequence[Tensor] | None = None
) -> nn.Sequential:
    """The convolutions that a layer is split into, in a row.

    They have the layer's device, dtype, padding mode, training flag, `requires_grad` and hooks;
    the last one has its bias.

    Args:
        conv: the layer; left as it is.
        split: shapes of the pieces' weights, as `axis_owners` accepts them.
        weights: their values; None: torch's default initialisation.
    """
    owners = axis_owners(Geometry.of(conv).kernel, split)
    pieces = []
    for place, shape in enumerate(split):
        owned = [owner == place for owner in owners]
        last = place == len(split) - 1
        piece = nn.Conv2d(
            shape[1],
            shape[0],
            (shape[2], shape[3]),
            stride=_where(owned, conv.stride, 1),
            padding=conv.padding
            if isinstance(conv.padding, str)
            else _where(owned, conv.padding, 0),
            bias=last and conv.bias is not None,
            padding_mode=conv.padding_mode if any(owned) else "zeros",
            # Values that are given need no initialisation, and no random numbers for it.
            device=conv.weight.device if weights is None else "meta",
            dtype=conv.weight.dtype,
        )
        if weights is not None:
            # Not by `to_empty`: on a meta tensor it takes torch's symbolic shapes, and with them
            # half a second of imports.
            values = torch.empty(shape, dtype=conv.weight.dtype, device=conv.weight.device)
            piece.weight = nn.Parameter(values.copy_(weights[place]))
            if piece.bias is not None and conv.bias is not None:
                piece.bias = nn.Parameter(conv.bias.detach().clone())
        piece.weight.requires_grad_(conv.weight.requires_grad)
        if piece.bias is not None and conv.bias is not None:
            piece.bias.requires_grad_(conv.bias.requires_grad)
        pieces.append(piece)
    row = nn.Sequential(*pieces).train(conv.training)
    for key in _HOOKS:
        if key in vars(conv):
            vars(row)[key] = vars(conv)[key]
    return row


def _where(owned: Sequence[bool], values: Sequence[int], otherwise: int) -> tuple[int, int]:
    """The layer's value along the axes that a piece owns."""
    height, width = (
        int(value) if own else otherwise for own, value in zip(owned, values, strict=True)
    )
    return height, width


def put_in_place(
    model: nn.Module, convs: Mapping[str, nn.Conv2d], rows: Mapping[str, nn.Sequential]
) -> tuple[nn.Module, dict[str, list[str]]]:
    """Exchanges layers for their pieces, in place.

    Args:
        model: the user's model.
        convs: its layers by name.
        rows: what takes their place, by the same names.

    Returns:
        The model, a new module only where the model itself was the layer, and the names of
        each layer's pieces.
    """
    changes = {
        name: [f"{name}.{place}" if name else str(place) for place in range(len(row))]
        for name, row in rows.items()
    }
    if "" in rows:
        return rows[""], changes
    replace_modules(model, {convs[name]: row for name, row in rows.items()})
    return model, changes
