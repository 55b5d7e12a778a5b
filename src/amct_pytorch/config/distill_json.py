"""The config of block-wise distillation as a JSON file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from amct_pytorch.config.distill import (
    DISTILL_GLOBAL_KEYS,
    DISTILL_KINDS,
    DistillConfig,
    DistillLayerConfig,
)
from amct_pytorch.config.layer_rules import configurable
from amct_pytorch.config.layered_json import load_layered
from amct_pytorch.config.retrain import weights_default, why_not_channel_wise
from amct_pytorch.errors import ProblemList, did_you_mean
from amct_pytorch.files import PathLike
from amct_pytorch.graph.layers import SeenLayer


def distillable(layers: Sequence[SeenLayer]) -> tuple[SeenLayer, ...]:
    """The layers of a look, with the reason for those whose type is not distilled."""
    return tuple(
        replace(layer, reason=f"{layer.kind} is not distilled; such are {', '.join(DISTILL_KINDS)}")
        if layer.reason is None and layer.kind not in DISTILL_KINDS
        else layer
        for layer in layers
    )


def default_distill_layers(layers: Sequence[SeenLayer]) -> dict[str, DistillLayerConfig]:
    """ULQ inputs and ARQ weights with 8 bits for every layer that can be distilled.

    Layers that cannot are left out, each with a line in the log that says why.

    Args:
        layers: as `distillable` gives them.
    """
    return {
        layer.name: DistillLayerConfig.model_validate(
            {"distill_weight_config": weights_default(layer)}
        )
        for layer in configurable(layers, DISTILL_GLOBAL_KEYS)
    }


def load_distill_json(
    path: PathLike, layers: Sequence[SeenLayer], module_names: Collection[str]
) -> DistillConfig:
    """Read a config and hold it against the model; every key has a default.

    Args:
        path: the JSON file.
        layers: as `distillable` gives them.
        module_names: names of all modules of the model.

    Raises:
        FileMissingError, FileAccessError, ConfigError: see `load_layered`; also for groups with
            layers that do not exist or stand in two of them.
    """

    def fill(raw: dict[str, Any], layer: SeenLayer) -> dict[str, Any]:
        weights = raw.get("distill_weight_config", {})
        if isinstance(weights, dict):
            weights = {**weights_default(layer), **weights}
        return {**raw, "distill_weight_config": weights}

    def check(config: DistillLayerConfig, layer: SeenLayer, problems: ProblemList) -> None:
        if not config.quant_enable:
            return
        if layer.reason is not None:
            problems.add(
                f"{layer.name}: cannot be quantized: {layer.reason} "
                "(leave it out, or set its quant_enable to false)"
            )
        refused = why_not_channel_wise(layer)
        if config.distill_weight_config.channel_wise and refused is not None:
            problems.add(
                f"{layer.name}.distill_weight_config.channel_wise is true, which is not allowed: "
                f"{refused}"
            )

    def check_groups(config: DistillConfig, problems: ProblemList) -> None:
        known = {layer.name for layer in layers}
        seen: set[str] = set()
        for number, group in enumerate(config.distill_group):
            if not group:
                problems.add(f"distill_group[{number}] is empty; allowed: at least one layer")
            for name in group:
                place = f"distill_group[{number}]: {name}"
                if name not in known:
                    problems.add(f"{place}: the model has no such layer{did_you_mean(name, known)}")
                elif name in seen:
                    problems.add(f"{place} stands in the groups more than once")
                seen.add(name)

    return load_layered(path, layers, module_names, DistillConfig, fill, check, check_groups)
