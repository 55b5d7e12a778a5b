"""The blocks to distill: those that are found, and those that a .cfg asks for."""

from __future__ import annotations

from collections.abc import Sequence

from amct_pytorch.errors import ConfigError, ModelError, ProblemList, did_you_mean
from amct_pytorch.graph.blocks import cut, find_block
from amct_pytorch.graph.look import ModelGraph
from amct_pytorch.graph.units import Units
from amct_pytorch.logs import logger


def found_groups(graph: ModelGraph, layers: Sequence[str], size: int) -> list[list[str]]:
    """Blocks of up to `size` units, for as many of `layers` as can be.

    A layer that is in none is logged with the reason.
    """
    groups = []
    for chain in Units(graph.trace, graph.calls).chains(layers):
        for piece in cut(chain, size):
            try:
                find_block(graph.trace, graph.calls, piece[0], piece[-1])
            except ModelError as error:
                logger.warning("%s: not distilled, only quantized: %s", ", ".join(piece), error)
            else:
                groups.append(piece)
    return groups


def user_groups(
    graph: ModelGraph, asked: Sequence[tuple[str, str]], layers: Sequence[str], place: str
) -> list[list[str]]:
    """The layers of each block that a .cfg names by its first and last layer.

    Args:
        graph: what a look at the model found.
        asked: first and last layer of each.
        layers: those that the config has.
        place: the file's name, for messages.

    Raises:
        ConfigError: all of them in one error: layers that do not exist, blocks that more than
            one tensor enters or leaves, layers in two blocks.
    """
    problems = ProblemList(place, ConfigError)
    groups: list[list[str]] = []
    taken: set[str] = set()
    for number, (start, end) in enumerate(asked):
        where = f"distill_group[{number}]"
        unknown = [name for name in (start, end) if name not in layers]
        for name in dict.fromkeys(unknown):
            problems.add(
                f"{where}: {name}: the model has no such layer to distill"
                f"{did_you_mean(name, layers)}"
            )
        if unknown:
            continue
        try:
            block = find_block(graph.trace, graph.calls, start, end)
        except ModelError as error:
            problems.add(f"{where}: {error}")
            continue
        group = [name for name in block.layers if name in layers]
        for name in group:
            if name in taken:
                problems.add(f"{where}: {name} stands in the groups more than once")
        taken.update(group)
        groups.append(group)
    problems.raise_if_any()
    return groups
