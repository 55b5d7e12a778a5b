"""From a .cfg and the model's layers to the calibration config."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from amct_pytorch.config.cfg_block import Block, read_block
from amct_pytorch.config.explain import explain
from amct_pytorch.config.layer_rules import (
    allowed_inputs,
    allowed_weights,
    configurable,
    unknown_modules,
    why_not_packed,
)
from amct_pytorch.config.models import CalibrationConfig, LayerConfig
from amct_pytorch.config.overrides import Overrides
from amct_pytorch.errors import ConfigError, ProblemList
from amct_pytorch.graph.layers import LAYER_KINDS, SeenLayer
from amct_pytorch.proto import AMCTConfig

logger = logging.getLogger("amct_pytorch")


def calibration_config_from_cfg(
    message: AMCTConfig,
    layers: Sequence[SeenLayer],
    module_names: Collection[str],
    place: str,
) -> CalibrationConfig:
    """What a .cfg means for a model.

    For each layer the override by its name counts, else the one by its type, else
    `common_config`; blocks are not mixed: a field that a block leaves out has the schema's
    default. Layers that are skipped, by name or by type, stay in the config with
    `quant_enable` false. Layers that cannot be quantized are left out, with a line in the log.
    Where a block for many layers asks for what one of them cannot have (`channel_wise`, 6 or
    7 bits), the rest gets it and the log names those that do not.

    Args:
        message: what `parse_calibration_cfg` returned.
        layers: what a look at the model found.
        module_names: names of all modules of the model.
        place: the file's name, for messages.

    Raises:
        ConfigError: all of them in one error (up to ten): values out of range, names of
            layers or types that do not exist or are there twice, and layers that cannot have
            what is asked of them by name.
    """
    problems = ProblemList(place, ConfigError)
    asked = _asked(message, layers, module_names, problems)
    config = _globals(message, module_names, problems)
    notes = _Notes()
    configured = {
        layer.name: _layer_config(layer, asked, problems, notes) for layer in configurable(layers)
    }
    problems.raise_if_any()
    notes.log(place)
    return config.model_copy(update={"layers": configured})


@dataclass
class _Notes:
    """What a block asked of a layer that does not get it, grouped so that one line tells it."""

    refused: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    def add(self, block: str, key: str, reason: str, layer: str) -> None:
        self.refused.setdefault((block, key, reason), []).append(layer)

    def log(self, source: str) -> None:
        for (block, key, reason), names in self.refused.items():
            logger.warning(
                "%s: %s: %s is not applied to %s: %s", source, block, key, ", ".join(names), reason
            )


def _asked(
    message: AMCTConfig,
    layers: Sequence[SeenLayer],
    module_names: Collection[str],
    problems: ProblemList,
) -> Overrides[Block]:
    """The blocks and skip lists of the file."""

    def read(entry: Any, place: str) -> Block:
        block = read_block(entry.calibration_config, f"{place}.calibration_config", problems)
        # A block with problems counts as its default, so that the search for more can go on.
        return block or Block()

    common = read_block(message.common_config, "common_config", problems) or Block()
    asked = Overrides(common, layers, module_names, problems)
    asked.add_types(message.override_layer_types, "override_layer_types", read)
    asked.add_layers(message.override_layer_configs, "override_layer_configs", read)
    asked.skip_layers(message.skip_layers, "skip_layers")
    asked.skip_types(message.skip_layer_types, "skip_layer_types")
    return asked


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _globals(
    message: AMCTConfig, module_names: Collection[str], problems: ProblemList
) -> CalibrationConfig:
    skip_fusion = _once(message.skip_fusion_layers)
    for text in unknown_modules(skip_fusion, module_names):
        problems.add(f"skip_fusion_layers: {text}")
    raw = {
        "batch_num": message.batch_num,
        "activation_offset": message.activation_offset,
        "do_fusion": message.do_fusion,
        "skip_fusion_layers": skip_fusion,
    }
    if message.HasField("fakequant_precision_mode"):
        modes = message.DESCRIPTOR.fields_by_name["fakequant_precision_mode"].enum_type
        raw["fakequant_precision_mode"] = modes.values_by_number[
            message.fakequant_precision_mode
        ].name
    try:
        return CalibrationConfig.model_validate(raw)
    except ValidationError as error:
        explain(error, CalibrationConfig, problems)
        return CalibrationConfig()


def _layer_config(
    layer: SeenLayer, asked: Overrides[Block], problems: ProblemList, notes: _Notes
) -> LayerConfig:
    block = asked.block(layer)
    by_name, enabled = layer.name in asked.by_name, not asked.skipped(layer)

    def tell(key: str, reason: str) -> None:
        key = {"num_bits": "quant_bits"}.get(key, key)
        if by_name:
            problems.add(f"{block.place}: {key} is not allowed for {layer.name}: {reason}")
        elif enabled:
            notes.add(block.place, key, reason, layer.name)

    channel_wise = block.channel_wise
    if channel_wise is None:
        channel_wise = LAYER_KINDS[layer.kind].channel_wise
    weights = block.weights.model_copy(update={"channel_wise": channel_wise})
    weights = allowed_weights(layer, weights, tell)
    reason = why_not_packed(layer) if weights.num_bits == 4 and enabled else None
    if reason is not None:
        # The file keeps what was asked for; calibration falls back, and says so in its ledger.
        logger.warning("%s: weights will get 8 bits, not 4: %s", layer.name, reason)
    return LayerConfig.model_validate(
        {
            "quant_enable": enabled,
            **({} if block.balancer is None else {"dmq_balancer_param": block.balancer}),
            "activation_quant_params": allowed_inputs(layer, block.activation, tell),
            "weight_quant_params": weights,
        }
    )
