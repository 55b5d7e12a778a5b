"""The config of quantization-aware training as a JSON file."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from amct_pytorch.config.layer_rules import configurable, why_not_packed
from amct_pytorch.config.layered_json import load_layered
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
from amct_pytorch.errors import ProblemList
from amct_pytorch.files import PathLike
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

    def fill(raw: dict[str, Any], layer: SeenLayer) -> dict[str, Any]:
        weights = raw.get("retrain_weight_config", {})
        if isinstance(weights, dict):
            weights = {**weights_default(layer), **weights}
        return {**raw, "retrain_weight_config": weights}

    def check(config: RetrainLayerConfig, layer: SeenLayer, problems: ProblemList) -> None:
        if not config.retrain_enable:
            return
        if layer.reason is not None:
            problems.add(
                f"{layer.name}: cannot be quantized: {layer.reason} "
                "(leave it out, or set its retrain_enable to false)"
            )
        refused = why_not_channel_wise(layer)
        if config.retrain_weight_config.channel_wise and refused is not None:
            problems.add(
                f"{layer.name}.retrain_weight_config.channel_wise is true, which is not allowed: "
                f"{refused}"
            )

    config = load_layered(path, layers, module_names, RetrainConfig, fill, check)
    check_any_enabled(config, str(path))
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
