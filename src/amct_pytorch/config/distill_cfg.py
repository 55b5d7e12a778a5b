"""From a .cfg and the model's layers to the config of block-wise distillation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from amct_pytorch.config.distill import (
    DISTILL_GLOBAL_KEYS,
    DISTILL_KINDS,
    DistillConfig,
    DistillLayerConfig,
)
from amct_pytorch.config.layer_rules import configurable
from amct_pytorch.config.layered_json import checked_globals
from amct_pytorch.config.overrides import Overrides
from amct_pytorch.config.trained_blocks import TrainedBlock, Wording, layer_keys, read_trained_block
from amct_pytorch.errors import ConfigError, ProblemList
from amct_pytorch.graph.layers import SeenLayer
from amct_pytorch.proto import AMCTDistillConfig

logger = logging.getLogger("amct_pytorch")

WORDING = Wording(
    data="distill_data_quant_config",
    weights="distill_weight_quant_config",
    weights_oneof="weights_distill_algo",
    default_algo="arq_distill",
)


def distill_config_from_cfg(
    message: AMCTDistillConfig,
    layers: Sequence[SeenLayer],
    module_names: Collection[str],
    place: str,
) -> DistillConfig:
    """What a .cfg means for a model, but for its groups.

    For inputs and for weights each, the override by a layer's name counts, else the one by its
    type, else the global block, else the defaults. Layers of `quant_skip_layers` and
    `quant_skip_layer_types` stay in the config with `quant_enable` false.

    Args:
        message: what `parse_distill_cfg` returned.
        layers: as `distillable` gives them.
        module_names: names of all modules of the model.
        place: the file's name, for messages.

    Raises:
        ConfigError: all of them in one error (up to ten): values out of range, names of layers
            or types that do not exist or are there twice, layers that cannot have what is asked
            of them by name.
    """
    problems = ProblemList(place, ConfigError)
    common = read_trained_block(message, "", WORDING, problems)
    asked = Overrides(common, layers, module_names, problems, DISTILL_KINDS)

    def read(entry: Any, where: str) -> TrainedBlock:
        return read_trained_block(entry, f"{where}.", WORDING, problems)

    asked.add_types(message.distill_override_layer_types, "distill_override_layer_types", read)
    asked.add_layers(message.distill_override_layers, "distill_override_layers", read)
    asked.skip_layers(message.quant_skip_layers, "quant_skip_layers")
    asked.skip_types(message.quant_skip_layer_types, "quant_skip_layer_types")
    raw = {
        "batch_num": message.batch_num,
        "group_size": message.group_size,
        "data_dump": message.data_dump,
    }
    config = checked_globals(raw, DistillConfig, problems)
    refused: dict[str, list[str]] = {}
    configured = {}
    for layer in configurable(layers, DISTILL_GLOBAL_KEYS):
        data, weights = layer_keys(layer, asked, WORDING, problems, refused)
        configured[layer.name] = DistillLayerConfig.model_validate(
            {
                "quant_enable": not asked.skipped(layer),
                "distill_data_config": data,
                "distill_weight_config": weights,
            }
        )
    problems.raise_if_any()
    for reason, names in refused.items():
        logger.warning("%s: channel_wise is not applied to %s: %s", place, ", ".join(names), reason)
    return config.model_copy(update={"layers": configured})
