"""Finding the blocks of a model that is calibrated block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, did_you_mean

Blocks = list[tuple[str, nn.Module]]
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(
    model: nn.Module, blocks: str | Sequence[str] | None, count: Callable[[nn.Module], int]
) -> Blocks:
    """Names and blocks in order.

    Args:
        model: the model.
        blocks: name of their container, their names, or None for the container with the most
            layers to calibrate (of equals: the one with the most members).
        count: the number of layers to calibrate in a module.

    Raises:
        ArgumentTypeError: if `blocks` is something else.
        ArgumentValueError: for a name that the model does not have, a container without
            members, a block named twice, or no container.
    """
    modules = dict(model.named_modules())
    if blocks is None:
        found = [
            (count(module), len(module), name)
            for name, module in modules.items()
            if isinstance(module, _CONTAINERS) and count(module)
        ]
        if not found:
            raise ArgumentValueError(
                "model has no ModuleList, Sequential or ModuleDict with layers to calibrate; "
                "name its blocks in blocks"
            )
        blocks = max(found)[2]
    if isinstance(blocks, str):
        container = _named(modules, blocks)
        prefix = f"{blocks}." if blocks else ""
        names = [f"{prefix}{name}" for name, _ in container.named_children()]
        if not isinstance(container, _CONTAINERS) or not names:
            raise ArgumentValueError(
                f"blocks is {blocks!r}, a {type(container).__name__}; allowed are containers "
                "(ModuleList, Sequential, ModuleDict) with members, or a list of block names"
            )
    elif isinstance(blocks, Sequence) and all(isinstance(name, str) for name in blocks):
        names = list(blocks)
    else:
        raise ArgumentTypeError(
            f"blocks is a {type(blocks).__name__}; allowed are a name, a list of names, None"
        )
    chain = [(name, _named(modules, name)) for name in names]
    if not chain or len({id(block) for _, block in chain}) < len(chain):
        raise ArgumentValueError(f"blocks names {names}; each block must be there just once")
    return chain


def _named(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise ArgumentValueError(
            f"blocks names {name!r}, which the model does not have{did_you_mean(name, modules)}"
        )
    return modules[name]
