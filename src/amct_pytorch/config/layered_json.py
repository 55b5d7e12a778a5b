"""Config files that hold global keys and, beside them, one object a layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from amct_pytorch.config.explain import dotted, explain
from amct_pytorch.config.json_text import parse_json
from amct_pytorch.config.layer_rules import unknown_layer
from amct_pytorch.config.models import Strict
from amct_pytorch.errors import ConfigError, ProblemList, did_you_mean, shown
from amct_pytorch.files import PathLike, read_text
from amct_pytorch.graph.layers import SeenLayer

Whole = TypeVar("Whole", bound=Strict)


def global_keys(whole: type[Strict]) -> tuple[str, ...]:
    """The keys that stand beside the layers in the file of this kind of config."""
    return tuple(key for key in whole.model_fields if key != "layers")


def dump_layered(config: Strict) -> str:
    """The file's text: the global keys, then the layers as they stand in `config.layers`.

    Keys whose value is None are left out.
    """
    document = config.model_dump(mode="json", exclude_none=True)
    layers = document.pop("layers")
    return json.dumps({**document, **layers}, indent=4, ensure_ascii=False) + "\n"


def load_layered(
    path: PathLike,
    layers: Sequence[SeenLayer],
    module_names: Collection[str],
    whole: type[Whole],
    fill: Callable[[dict[str, Any], SeenLayer], dict[str, Any]],
    check: Callable[[Any, SeenLayer, ProblemList], None],
    check_globals: Callable[[Whole, ProblemList], None] = lambda config, problems: None,
) -> Whole:
    """Read a config and hold it against the model.

    Args:
        path: the JSON file.
        layers: what a look at the model found.
        module_names: names of all modules of the model.
        whole: the config's model; its field `layers` is a dict of the layers' own.
        fill: gives a layer's object in the file the defaults that its type has.
        check: adds a problem for what the layer cannot have.
        check_globals: adds a problem for what is wrong with the global keys.

    Returns:
        The config; its layers are in the model's order.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: the text is not JSON; or, all of them in one error (up to ten): keys that
            are unknown or twice there, values of the wrong type or out of range, layers that
            the model does not have, and what the checks find.
    """
    source = str(path)
    problems = ProblemList(source, ConfigError)
    document = parse_json(read_text(path, "config_file"), source, problems)
    keys = global_keys(whole)
    config = checked_globals({k: v for k, v in document.items() if k in keys}, whole, problems)
    check_globals(config, problems)
    known = {layer.name: layer for layer in layers}
    layer_model = get_args(whole.model_fields["layers"].annotation)[1]
    found: dict[str, Strict] = {}
    for name, raw in document.items():
        if name in keys:
            continue
        if name in known:
            layer = _layer(known[name], raw, layer_model, fill, problems)
            if layer is not None:
                found[name] = layer
                check(layer, known[name], problems)
        elif isinstance(raw, dict):
            problems.add(unknown_layer(name, layers, module_names))
        else:
            problems.add(f"{name}: unknown key{did_you_mean(name, (*keys, *known))}")
    problems.raise_if_any()
    ordered = {name: found[name] for name in known if name in found}
    return config.model_copy(update={"layers": ordered})


def checked_globals(raw: dict[str, Any], whole: type[Whole], problems: ProblemList) -> Whole:
    """A config without layers; where a problem was added, the default one."""
    try:
        return whole.model_validate(raw)
    except ValidationError as error:
        explain(error, whole, problems)
        return whole()


def _layer(
    layer: SeenLayer,
    raw: Any,
    model: type[Strict],
    fill: Callable[[dict[str, Any], SeenLayer], dict[str, Any]],
    problems: ProblemList,
) -> Strict | None:
    """The layer's config; None where a problem was added."""
    if not isinstance(raw, dict):
        problems.add(f"{layer.name} is {shown(raw)}; allowed: an object")
        return None
    try:
        return model.model_validate(fill(raw, layer))
    except ValidationError as error:
        explain(error, model, problems, lambda parts: dotted([layer.name, *parts]))
        return None
