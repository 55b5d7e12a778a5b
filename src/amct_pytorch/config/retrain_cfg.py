"""From a .cfg and the model's layers to the config of quantization-aware training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from amct_pytorch.config.layer_rules import configurable
from amct_pytorch.config.layered_json import checked_globals
from amct_pytorch.config.overrides import Overrides
from amct_pytorch.config.retrain import (
    RETRAIN_GLOBAL_KEYS,
    RETRAIN_KINDS,
    RetrainConfig,
    RetrainLayerConfig,
    check_any_enabled,
)
from amct_pytorch.config.trained_blocks import (
    TrainedBlock,
    Wording,
    enum_name,
    layer_keys,
    read_trained_block,
)
from amct_pytorch.errors import ConfigError, ProblemList
from amct_pytorch.graph.layers import SeenLayer
from amct_pytorch.proto import AMCTRetrainConfig

logger = logging.getLogger("amct_pytorch")

DATA, WEIGHTS = "retrain_data_quant_config", "retrain_weight_quant_config"


WORDING = Wording(DATA, WEIGHTS, "weights_retrain_algo", "arq_retrain")


def asks_for_quantization(message: AMCTRetrainConfig) -> bool:
    """Whether the file switches quantization on; overrides alone do not."""
    return bool(message.HasField(DATA) or message.HasField(WEIGHTS))


def retrain_config_from_cfg(
    message: AMCTRetrainConfig,
    layers: Sequence[SeenLayer],
    module_names: Collection[str],
    place: str,
) -> RetrainConfig:
    """What the quantization part of a .cfg means for a model.

    For inputs and for weights each, the override by a layer's name counts, else the one by its
    type, else the global block, else the defaults; a field that a block leaves out has the
    schema's default. Layers that are skipped (`skip_layers`, `skip_layer_types`,
    `quant_skip_layers`, `quant_skip_types`) stay in the config with `retrain_enable` false.
    Layers that cannot be trained are left out, with a line in the log.

    Args:
        message: what `parse_retrain_cfg` returned.
        layers: as `retrainable` gives them.
        module_names: names of all modules of the model.
        place: the file's name, for messages.

    Raises:
        ConfigError: quantization is not switched on; or, all of them in one error (up to ten):
            values out of range, names of layers or types that do not exist or are there twice,
            layers that cannot have what is asked of them by name; or no layer is left.
    """
    _check_switched_on(message, place)
    problems = ProblemList(place, ConfigError)
    common = read_trained_block(message, "", WORDING, problems)
    asked = Overrides(common, layers, module_names, problems, RETRAIN_KINDS)

    def read(entry: Any, where: str) -> TrainedBlock:
        return read_trained_block(entry, f"{where}.", WORDING, problems)

    asked.add_types(message.override_layer_types, "override_layer_types", read)
    asked.add_layers(message.override_layer_configs, "override_layer_configs", read)
    for field in ("skip_layers", "quant_skip_layers"):
        asked.skip_layers(getattr(message, field), field)
    for field in ("skip_layer_types", "quant_skip_types"):
        asked.skip_types(getattr(message, field), field)
    raw: dict[str, Any] = {"batch_num": message.batch_num}
    if message.HasField("fakequant_precision_mode"):
        raw["fakequant_precision_mode"] = enum_name(message, "fakequant_precision_mode")
    config = checked_globals(raw, RetrainConfig, problems)
    refused: dict[str, list[str]] = {}
    configured = {}
    for layer in configurable(layers, RETRAIN_GLOBAL_KEYS):
        data, weights = layer_keys(layer, asked, WORDING, problems, refused)
        configured[layer.name] = RetrainLayerConfig.model_validate(
            {
                "retrain_enable": not asked.skipped(layer),
                "retrain_data_config": data,
                "retrain_weight_config": weights,
            }
        )
    problems.raise_if_any()
    for reason, names in refused.items():
        logger.warning("%s: channel_wise is not applied to %s: %s", place, ", ".join(names), reason)
    config = config.model_copy(update={"layers": configured})
    check_any_enabled(config, place)
    return config


def _check_switched_on(message: AMCTRetrainConfig, place: str) -> None:
    if asks_for_quantization(message):
        return
    overrides = [
        f"override_layer_configs[{entry.layer_name}]"
        for entry in message.override_layer_configs
        if asks_for_quantization(entry)
    ] + [
        f"override_layer_types[{entry.layer_type}]"
        for entry in message.override_layer_types
        if asks_for_quantization(entry)
    ]
    only = f"; it has only overrides ({overrides[0]}), which do not" if overrides else ""
    raise ConfigError(
        f"{place}: {DATA} or {WEIGHTS} switches quantization on, and the file has neither{only}"
    )
