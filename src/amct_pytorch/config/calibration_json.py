"""The calibration config as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from pydantic import ValidationError

from amct_pytorch.config.explain import dotted, explain
from amct_pytorch.config.json_text import parse_json
from amct_pytorch.config.layer_rules import (
    allowed_inputs,
    allowed_weights,
    fill_defaults,
    unknown_layer,
    unknown_modules,
)
from amct_pytorch.config.models import GLOBAL_KEYS, CalibrationConfig, LayerConfig
from amct_pytorch.errors import ConfigError, ProblemList, did_you_mean, shown
from amct_pytorch.files import PathLike, read_text
from amct_pytorch.graph.layers import SeenLayer

# Keys that are this toolkit's own.
OWN_KEYS = ("bias_correction", "cross_layer_equalization", "linear_channel_wise")


def dump_calibration_json(config: CalibrationConfig) -> str:
    """The file's text: the global keys, then the layers by name, each key in its place.

    Optional keys that say nothing are left out: `fakequant_precision_mode` and `asymmetric`
    unless set, OWN_KEYS while at their defaults, `dmq_balancer_param` unless balancing was
    asked for.
    """
    document = config.model_dump(mode="json", exclude_none=True, exclude={"layers"})
    for key in OWN_KEYS:
        if getattr(config, key) == CalibrationConfig.model_fields[key].default:
            del document[key]
    for name in sorted(config.layers):
        document[name] = config.layers[name].model_dump(mode="json", exclude_none=True)
    return json.dumps(document, indent=4, ensure_ascii=False) + "\n"


def load_calibration_json(
    path: PathLike, layers: Sequence[SeenLayer], module_names: Collection[str]
) -> CalibrationConfig:
    """Read a calibration config and hold it against the model.

    Every key has a default except `num_bits`. A layer that is in the file without its blocks
    gets those of its type; a layer that is not in the file is not in the result.

    Args:
        path: the JSON file.
        layers: what a look at the model found.
        module_names: names of all modules of the model.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: the text is not JSON; or, all of them in one error (up to ten): keys that
            are unknown or twice there, values of the wrong type or out of range, layers that
            the model does not have or that cannot be quantized as asked.
    """
    source = str(path)
    problems = ProblemList(source, ConfigError)
    document = parse_json(read_text(path, "config_file"), source, problems)
    by_name = {layer.name: layer for layer in layers}

    config = _globals(
        {key: value for key, value in document.items() if key in GLOBAL_KEYS}, problems
    )
    for text in unknown_modules(config.skip_fusion_layers, module_names):
        problems.add(f"skip_fusion_layers: {text}")

    configured: dict[str, LayerConfig] = {}
    for name, raw in document.items():
        if name in GLOBAL_KEYS:
            continue
        if name in by_name:
            layer_config = _layer(by_name[name], raw, config, problems)
            if layer_config is not None:
                configured[name] = layer_config
        elif isinstance(raw, dict):
            problems.add(unknown_layer(name, layers, module_names))
        else:
            problems.add(f"{name}: unknown key{did_you_mean(name, (*GLOBAL_KEYS, *by_name))}")
    problems.raise_if_any()
    return config.model_copy(update={"layers": configured})


def _globals(raw: dict[str, Any], problems: ProblemList) -> CalibrationConfig:
    try:
        return CalibrationConfig.model_validate(raw)
    except ValidationError as error:
        explain(error, CalibrationConfig, problems)
        return CalibrationConfig()


def _layer(
    layer: SeenLayer, raw: Any, whole: CalibrationConfig, problems: ProblemList
) -> LayerConfig | None:
    """The layer's config; None where a problem was added."""
    if not isinstance(raw, dict):
        problems.add(f"{layer.name} is {shown(raw)}; allowed: an object")
        return None
    try:
        config = LayerConfig.model_validate(
            fill_defaults(raw, layer, channel_wise_linear=whole.linear_channel_wise)
        )
    except ValidationError as error:
        explain(error, LayerConfig, problems, lambda parts: dotted([layer.name, *parts]))
        return None
    if config.quant_enable and layer.reason is not None:
        problems.add(
            f"{layer.name}: cannot be quantized: {layer.reason} "
            "(leave it out, or set its quant_enable to false)"
        )
        return None

    def refuse(block: str) -> Callable[[str, str], None]:
        def add(key: str, reason: str) -> None:
            given = shown(getattr(getattr(config, block), key))
            problems.add(f"{layer.name}.{block}.{key} is {given}, which is not allowed: {reason}")

        return add

    inputs = allowed_inputs(
        layer, config.activation_quant_params, refuse("activation_quant_params")
    )
    weights = allowed_weights(
        layer,
        config.weight_quant_params,
        refuse("weight_quant_params"),
        channel_wise_linear=whole.linear_channel_wise,
    )
    return config.model_copy(
        update={
            "activation_quant_params": inputs,
            "weight_quant_params": weights,
        }
    )
