"""The config of quantization-aware training as a JSON file."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from amct_pytorch.config.explain import dotted, explain
from amct_pytorch.config.json_text import parse_json
from amct_pytorch.config.layer_rules import configurable, unknown_layer, why_not_packed
from amct_pytorch.config.retrain import (
    FEW_CHANNELS,
    RETRAIN_GLOBAL_KEYS,
    RetrainConfig,
    RetrainLayerConfig,
    check_any_enabled,
    few_channels,
    weights_default,
    why_not_channel_wise,
)
from amct_pytorch.errors import ConfigError, ProblemList, did_you_mean, shown
from amct_pytorch.files import PathLike, read_text
from amct_pytorch.graph.layers import SeenLayer

logger = logging.getLogger("amct_pytorch")


def default_retrain_config(layers: Sequence[SeenLayer]) -> RetrainConfig:
    """ULQ inputs and ARQ weights with 8 bits for every layer that can be trained.

    Layers that cannot are left out, each with a line in the log that says why.

    Args:
        layers: as `retrainable` gives them.
    """
    return RetrainConfig(
        layers={
            layer.name: RetrainLayerConfig.model_validate(
                {"retrain_weight_config": weights_default(layer)}
            )
            for layer in configurable(layers, RETRAIN_GLOBAL_KEYS)
        }
    )


def dump_retrain_json(config: RetrainConfig) -> str:
    """The file's text: the global keys, then the layers in the model's order.

    Clip values, `fixed_min` and `fakequant_precision_mode` are left out unless they are set.
    """
    document = config.model_dump(mode="json", exclude_none=True, exclude={"layers"})
    for name, layer in config.layers.items():
        document[name] = layer.model_dump(mode="json", exclude_none=True)
    return json.dumps(document, indent=4, ensure_ascii=False) + "\n"


def load_retrain_json(
    path: PathLike, layers: Sequence[SeenLayer], module_names: Collection[str]
) -> RetrainConfig:
    """Read a config and hold it against the model; every key has a default.

    Args:
        path: the JSON file.
        layers: as `retrainable` gives them.
        module_names: names of all modules of the model.

    Returns:
        The config; its layers are in the model's order.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: the text is not JSON; or, all of them in one error (up to ten): keys that
            are unknown or twice there, values of the wrong type or out of range, layers that
            the model does not have or that cannot be trained as asked; or no layer is enabled.
    """
    source = str(path)
    problems = ProblemList(source, ConfigError)
    document = parse_json(read_text(path, "config_file"), source, problems)
    config = retrain_globals(
        {key: value for key, value in document.items() if key in RETRAIN_GLOBAL_KEYS}, problems
    )
    known = {layer.name: layer for layer in layers}
    configured: dict[str, RetrainLayerConfig] = {}
    for name, raw in document.items():
        if name in RETRAIN_GLOBAL_KEYS:
            continue
        if name in known:
            found = _layer(known[name], raw, problems)
            if found is not None:
                configured[name] = found
        elif isinstance(raw, dict):
            problems.add(unknown_layer(name, layers, module_names))
        else:
            problems.add(f"{name}: unknown key{did_you_mean(name, (*RETRAIN_GLOBAL_KEYS, *known))}")
    problems.raise_if_any()
    ordered = {name: configured[name] for name in known if name in configured}
    config = config.model_copy(update={"layers": ordered})
    check_any_enabled(config, source)
    return config


def retrain_globals(raw: dict[str, Any], problems: ProblemList) -> RetrainConfig:
    """A config without layers; where a problem was added, the default one."""
    try:
        return RetrainConfig.model_validate(raw)
    except ValidationError as error:
        explain(error, RetrainConfig, problems)
        return RetrainConfig()


def _layer(layer: SeenLayer, raw: Any, problems: ProblemList) -> RetrainLayerConfig | None:
    """The layer's config; None where a problem was added."""
    if not isinstance(raw, dict):
        problems.add(f"{layer.name} is {shown(raw)}; allowed: an object")
        return None
    weights = raw.get("retrain_weight_config", {})
    if isinstance(weights, dict):
        raw = {**raw, "retrain_weight_config": {**weights_default(layer), **weights}}
    try:
        config = RetrainLayerConfig.model_validate(raw)
    except ValidationError as error:
        explain(error, RetrainLayerConfig, problems, lambda parts: dotted([layer.name, *parts]))
        return None
    if not config.retrain_enable:
        return config
    if layer.reason is not None:
        problems.add(
            f"{layer.name}: cannot be quantized: {layer.reason} "
            "(leave it out, or set its retrain_enable to false)"
        )
        return None
    refused = why_not_channel_wise(layer)
    if config.retrain_weight_config.channel_wise and refused is not None:
        problems.add(
            f"{layer.name}.retrain_weight_config.channel_wise is true, which is not allowed: "
            f"{refused}"
        )
        return None
    return config


def tell_of_layers(layers: Sequence[SeenLayer], config: RetrainConfig) -> None:
    """Logs what a user should know of the layers that a config enables."""
    few = few_channels(layers, config)
    if few:
        logger.warning(
            "quantizing layers with %d input channels or fewer is not recommended: %s",
            FEW_CHANNELS,
            ", ".join(f"{name} ({channels})" for name, channels in few.items()),
        )
    enabled = config.enabled_layers()
    for layer in layers:
        asked = enabled.get(layer.name)
        if asked is None or asked.retrain_weight_config.dst_type != "INT4":
            continue
        reason = why_not_packed(layer)
        if reason is not None:
            logger.warning(
                "%s: trained with weights of 4 bits, deployed with 8: %s", layer.name, reason
            )
