"""The KV-cache config as a JSON file, and from a .cfg."""

from __future__ import annotations

import json
import logging
from typing import Any

from google.protobuf.message import Message
from pydantic import ValidationError
from torch import nn

from amct_pytorch.config.cfg_block import activation_of
from amct_pytorch.config.explain import dotted, explain
from amct_pytorch.config.json_text import parse_json
from amct_pytorch.config.kv_cache import (
    GRANULARITIES,
    KV_GLOBAL_KEYS,
    KvCacheConfig,
    KvLayerConfig,
    check_any_layer,
    expanded,
    globals_of,
    layer_problem,
    linear_names,
)
from amct_pytorch.errors import ConfigError, ProblemList, did_you_mean, shown
from amct_pytorch.files import PathLike, read_text
from amct_pytorch.proto import AMCTQuantCaliConfig

logger = logging.getLogger("amct_pytorch")

_CFG_NAMES = {
    "search_range": "search_range_start/end",
    "search_range[0]": "search_range_start",
    "search_range[1]": "search_range_end",
}


def dump_kv_cache_json(config: KvCacheConfig) -> str:
    """The file's text: the global keys, then the layers, in the model's order.

    `asymmetric` is left out unless it is set.
    """
    document = config.model_dump(mode="json", exclude_none=True, exclude={"layers"})
    for name, layer in config.layers.items():
        document[name] = layer.model_dump(mode="json", exclude_none=True)
    return json.dumps(document, indent=4, ensure_ascii=False) + "\n"


def load_kv_cache_json(path: PathLike, model: nn.Module) -> KvCacheConfig:
    """Read a KV-cache config and hold it against the model.

    Args:
        path: the JSON file; every key has a default.
        model: whose layers it names.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: the text is not JSON; or, all of them in one error (up to ten): keys that
            are unknown or twice there, values of the wrong type or out of range, layers that
            the model does not have or that are no Linear.
    """
    source = str(path)
    problems = ProblemList(source, ConfigError)
    document = parse_json(read_text(path, "config_file"), source, problems)
    config = globals_of({k: v for k, v in document.items() if k in KV_GLOBAL_KEYS}, problems)
    modules = linear_names(model)
    layers: dict[str, KvLayerConfig] = {}
    for name, raw in document.items():
        if name in KV_GLOBAL_KEYS:
            continue
        problem = layer_problem(name, modules)
        if problem is None:
            layer = _layer(name, raw, problems)
            if layer is not None:
                layers[name] = layer
        elif isinstance(raw, dict):
            problems.add(problem)
        else:
            problems.add(f"{name}: unknown key{did_you_mean(name, (*KV_GLOBAL_KEYS, *modules))}")
    problems.raise_if_any()
    config = config.model_copy(update={"layers": layers})
    check_any_layer(config, source)
    return config


def _layer(name: str, raw: Any, problems: ProblemList) -> KvLayerConfig | None:
    """The layer's config; None where a problem was added."""
    if not isinstance(raw, dict):
        problems.add(f"{name} is {shown(raw)}; allowed: an object")
        return None
    try:
        return KvLayerConfig.model_validate(raw)
    except ValidationError as error:
        explain(error, KvLayerConfig, problems, lambda parts: dotted([name, *parts]))
        return None


def kv_cache_config_from_cfg(
    message: AMCTQuantCaliConfig, model: nn.Module, place: str
) -> KvCacheConfig:
    """What a .cfg means for a model.

    The layers are those of `quant_layers`, names or patterns, and those with an override. A
    layer's override counts in place of the common block; the two are not mixed.

    Args:
        message: what `parse_kv_cache_cfg` returned.
        model: whose layers it names.
        place: the file's name, for messages.

    Raises:
        ConfigError: all of them in one error (up to ten): values out of range, layers that do
            not exist, are no Linear or have two overrides, or no layer at all.
    """
    problems = ProblemList(place, ConfigError)
    modules = linear_names(model)
    raw = {"batch_num": message.batch_num, "activation_offset": message.activation_offset}
    config = globals_of(raw, problems)
    common_place = "kv_cache_quant_config"
    common = _block(
        message.kv_cache_quant_config.calibration_config,
        f"{common_place}.calibration_config",
        problems,
    )
    names = expanded(
        message.kv_cache_quant_config.quant_layers,
        modules,
        f"{common_place}.quant_layers",
        problems,
    )
    layers = dict.fromkeys(names, common)
    overridden: set[str] = set()
    for entry in message.override_layers_configs:
        here = f"override_layers_configs[{entry.layer_name}]"
        block = _block(entry.kv_data_quant_config, f"{here}.kv_data_quant_config", problems)
        problem = layer_problem(entry.layer_name, modules)
        if problem is not None:
            problems.add(f"{here}: {problem}")
        elif entry.layer_name in overridden:
            problems.add(f"{here} is there more than once")
        elif entry.layer_name not in layers:
            logger.warning("%s: %s is not in quant_layers; it is added to them", place, here)
        overridden.add(entry.layer_name)
        layers[entry.layer_name] = block
    problems.raise_if_any()
    ordered = {name: layers[name] for name in modules if name in layers}
    config = config.model_copy(update={"layers": ordered})
    check_any_layer(config, place)
    return config


def _block(message: Any, place: str, problems: ProblemList) -> KvLayerConfig:
    """One CalibrationConfig block; the default where a problem was added."""
    name = message.WhichOneof("acts_quant_algo") or "ifmr_quantize"
    raw = _params(getattr(message, name), name)

    def in_cfg(parts: list[str]) -> str:
        return ".".join([place, name, *(_CFG_NAMES.get(part, part) for part in parts[1:])])

    try:
        return KvLayerConfig.model_validate({"kv_data_quant_config": raw})
    except ValidationError as error:
        explain(error, KvLayerConfig, problems, in_cfg)
        return KvLayerConfig()


def _params(message: Message, name: str) -> dict[str, Any]:
    raw = activation_of(message, name)
    del raw["num_bits"]
    if "quant_granularity" in raw:
        raw["quant_granularity"] = GRANULARITIES[raw["quant_granularity"]]
    return raw
