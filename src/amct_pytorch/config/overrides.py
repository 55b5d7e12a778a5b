"""Which block of a .cfg applies to which layer: by its name, by its type, or the common one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, TypeVar

from amct_pytorch.config.layer_rules import unknown_layer
from amct_pytorch.errors import ProblemList, did_you_mean, shown
from amct_pytorch.graph.layers import CALIBRATED_KINDS, SeenLayer

logger = logging.getLogger("amct_pytorch")

Block = TypeVar("Block")


class Overrides(Generic[Block]):
    """The blocks and skip lists of a .cfg, checked against the model's layers.

    Args:
        common: the block for layers without an override.
        layers: what a look at the model found.
        module_names: names of all modules of the model.
        problems: gets names and types that do not exist, or are there twice.
        kinds: types of layers that overrides may name.
        done: what the file asks to be done to layers, for messages: ``quantized``, ``pruned``.
    """

    def __init__(
        self,
        common: Block,
        layers: Sequence[SeenLayer],
        module_names: Collection[str],
        problems: ProblemList,
        kinds: Collection[str] = CALIBRATED_KINDS,
        done: str = "quantized",
    ) -> None:
        self.common = common
        self.by_type: dict[str, Block] = {}
        self.by_name: dict[str, Block] = {}
        self._layers = {layer.name: layer for layer in layers}
        self._module_names = module_names
        self._problems = problems
        self._kinds = kinds
        self._done = done
        self._skip_layers: set[str] = set()
        self._skip_types: set[str] = set()

    def add_types(
        self, entries: Iterable[Any], field: str, read: Callable[[Any, str], Block]
    ) -> None:
        """Take the overrides by type.

        Args:
            entries: messages with a `layer_type`.
            field: the field they stand in, for messages.
            read: makes a block of an entry and its place in the file.
        """
        for entry in entries:
            place = f"{field}[{entry.layer_type}]"
            self._check_type(entry.layer_type, place)
            self._add(self.by_type, entry.layer_type, read(entry, place), place)

    def add_layers(
        self, entries: Iterable[Any], field: str, read: Callable[[Any, str], Block]
    ) -> None:
        """Take the overrides by name, for layers that nothing speaks against.

        Args:
            entries: messages with a `layer_name`.
            field: the field they stand in, for messages.
            read: makes a block of an entry and its place in the file.
        """
        for entry in entries:
            place = f"{field}[{entry.layer_name}]"
            self.check_name(entry.layer_name, place)
            layer = self._layers.get(entry.layer_name)
            if layer is not None and layer.reason is not None:
                self._problems.add(f"{place}: {layer.name} cannot be {self._done}: {layer.reason}")
            self._add(self.by_name, entry.layer_name, read(entry, place), place)

    def skip_layers(self, names: Iterable[str], field: str) -> None:
        """Take a list of layers to leave alone."""
        for name in dict.fromkeys(names):
            self.check_name(name, field)
            self._skip_layers.add(name)

    def skip_types(self, names: Iterable[str], field: str) -> None:
        """Take a list of types of layers to leave alone."""
        for name in dict.fromkeys(names):
            self._check_type(name, field)
            self._skip_types.add(name)

    def block(self, layer: SeenLayer) -> Block:
        """The block that applies to the layer."""
        if layer.name in self.by_name:
            return self.by_name[layer.name]
        return self.by_type.get(layer.kind, self.common)

    def skipped(self, layer: SeenLayer) -> bool:
        """Whether a skip list names the layer or its type."""
        return layer.name in self._skip_layers or layer.kind in self._skip_types

    def check_name(self, name: str, place: str) -> None:
        """Tell of a name that is none of the layers."""
        if name not in self._layers:
            sentence = unknown_layer(
                name, self._layers.values(), self._module_names, self._kinds, self._done
            )
            self._problems.add(f"{place}: {sentence}")

    def _add(self, blocks: dict[str, Block], name: str, block: Block, place: str) -> None:
        if name in blocks:
            self._problems.add(f"{place} is there more than once")
        blocks[name] = block

    def _check_type(self, name: str, place: str) -> None:
        if name not in self._kinds:
            hint = did_you_mean(name, self._kinds)
            self._problems.add(
                f"{place}: {shown(name)} is no type of layer that is {self._done}; "
                f"allowed: {', '.join(self._kinds)}{hint}"
            )
        elif all(layer.kind != name for layer in self._layers.values()):
            logger.warning("%s: the model has no layer of type %s", place, name)
