"""From a .cfg and the model's layers to the config of quantization-aware training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from amct_pytorch.config.cfg_block import shortest
from amct_pytorch.config.explain import explain
from amct_pytorch.config.layer_rules import configurable
from amct_pytorch.config.overrides import Overrides
from amct_pytorch.config.retrain import (
    RETRAIN_GLOBAL_KEYS,
    RETRAIN_KINDS,
    DataParams,
    RetrainConfig,
    RetrainLayerConfig,
    check_any_enabled,
    weights_default,
    why_not_channel_wise,
)
from amct_pytorch.config.retrain_json import retrain_globals
from amct_pytorch.errors import ConfigError, ProblemList
from amct_pytorch.graph.layers import SeenLayer
from amct_pytorch.proto import AMCTRetrainConfig

logger = logging.getLogger("amct_pytorch")

DATA, WEIGHTS = "retrain_data_quant_config", "retrain_weight_quant_config"


@dataclass(frozen=True)
class _Weights:
    """What a block asks of the weights of every layer it applies to.

    Attributes:
        place: where it stands in the file, for messages.
        keys: as in the JSON; `channel_wise` only where the file has it.
    """

    place: str
    keys: dict[str, Any]


@dataclass(frozen=True)
class _Block:
    """The two parts of an entry; None where the file has no such part."""

    data: DataParams | None = None
    weights: _Weights | None = None


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
    common = _read(message, "", problems)
    asked = Overrides(common, layers, module_names, problems, RETRAIN_KINDS)

    def read(entry: Any, where: str) -> _Block:
        return _read(entry, f"{where}.", problems)

    asked.add_types(message.override_layer_types, "override_layer_types", read)
    asked.add_layers(message.override_layer_configs, "override_layer_configs", read)
    for field in ("skip_layers", "quant_skip_layers"):
        asked.skip_layers(getattr(message, field), field)
    for field in ("skip_layer_types", "quant_skip_types"):
        asked.skip_types(getattr(message, field), field)
    raw: dict[str, Any] = {"batch_num": message.batch_num}
    if message.HasField("fakequant_precision_mode"):
        raw["fakequant_precision_mode"] = _enum_name(message, "fakequant_precision_mode")
    config = retrain_globals(raw, problems)
    refused: dict[str, list[str]] = {}
    configured = {
        layer.name: _layer_config(layer, asked, problems, refused)
        for layer in configurable(layers, RETRAIN_GLOBAL_KEYS)
    }
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


def _read(entry: Any, where: str, problems: ProblemList) -> _Block:
    """The parts of an entry; those with problems count as left out, so that the search for more
    can go on."""
    data = weights = None
    if entry.HasField(DATA):
        data = _data(getattr(entry, DATA).ulq_quantize, f"{where}{DATA}.ulq_quantize", problems)
    if entry.HasField(WEIGHTS):
        block = getattr(entry, WEIGHTS)
        algo = block.WhichOneof("weights_retrain_algo") or "arq_retrain"
        weights = _weights(getattr(block, algo), algo, f"{where}{WEIGHTS}.{algo}", problems)
    return _Block(data, weights)


def _enum_name(message: Any, field: str) -> str:
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    name: str = descriptor.enum_type.values_by_number[getattr(message, field)].name
    return name


def _data(message: Any, place: str, problems: ProblemList) -> DataParams | None:
    raw: dict[str, Any] = {"dst_type": _enum_name(message, "dst_type")}
    if message.HasField("clip_max_min"):
        raw["clip_max"] = shortest(message.clip_max_min.clip_max)
        raw["clip_min"] = shortest(message.clip_max_min.clip_min)
    if message.HasField("fixed_min"):
        raw["fixed_min"] = message.fixed_min

    def in_cfg(parts: list[str]) -> str:
        inside = "clip_max_min." if parts[0].startswith("clip") else ""
        return ".".join([place, inside + parts[0], *parts[1:]])

    try:
        return DataParams.model_validate(raw)
    except ValidationError as error:
        explain(error, DataParams, problems, in_cfg)
        return None


def _weights(message: Any, algo: str, place: str, problems: ProblemList) -> _Weights:
    keys: dict[str, Any] = {"algo": algo, "dst_type": _enum_name(message, "dst_type")}
    if keys["dst_type"] == "INT16":
        problems.add(
            f'{place}.dst_type is INT16; allowed: "INT8" or "INT4" '
            "(INT16 is reserved for a later version)"
        )
        keys["dst_type"] = "INT8"
    if message.HasField("channel_wise"):
        keys["channel_wise"] = message.channel_wise
    return _Weights(place, keys)


def _layer_config(
    layer: SeenLayer,
    asked: Overrides[_Block],
    problems: ProblemList,
    refused: dict[str, list[str]],
) -> RetrainLayerConfig:
    blocks = [
        block
        for block in (
            asked.by_name.get(layer.name),
            asked.by_type.get(layer.kind),
            asked.common,
        )
        if block is not None
    ]
    data = next((block.data for block in blocks if block.data is not None), DataParams())
    nothing = _Weights(WEIGHTS, {})
    weights = next((block.weights for block in blocks if block.weights is not None), nothing)
    keys = {**weights_default(layer), **weights.keys}
    reason = why_not_channel_wise(layer)
    enabled = not asked.skipped(layer)
    if keys["channel_wise"] and reason is not None:
        named = asked.by_name.get(layer.name)
        if named is not None and named.weights is weights:
            problems.add(f"{weights.place}: channel_wise is not allowed for {layer.name}: {reason}")
        elif enabled:
            refused.setdefault(reason, []).append(layer.name)
        keys["channel_wise"] = False
    return RetrainLayerConfig.model_validate(
        {"retrain_enable": enabled, "retrain_data_config": data, "retrain_weight_config": keys}
    )
